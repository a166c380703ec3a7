"""PPO of answers: rewards, advantages and losses by hand and by OpenRLHF's formulas; the Gibbs optimum."""

import pytest
import torch

from finetune import ops
from finetune.alignment import gibbs, kl, ppo_lm


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    owner = torch.tensor([0] * 4 + [1] + [3] * 6)  # the answer 2 is empty
    old, reference, values = (torch.randn(11, generator=g, dtype=torch.float64) for _ in range(3))
    return owner, old, reference, values, torch.tensor([1.0, -2.0, 5.0, 3.0], dtype=torch.float64)


def paid(scores, old, reference, owner, beta):
    """The reward of each token, written out."""
    found = -beta * (old - reference)
    for i in owner.unique():
        found[torch.nonzero(owner == i)[-1]] += scores[i]
    return found


def test_the_score_is_at_the_last_token_and_every_token_pays_its_kl():
    """At λ = 1 with values of 0 an advantage is the sum of the rewards from its token on."""
    owner, old, reference, values, scores = batch()
    e = ppo_lm.experience(scores, old, reference, 0 * values, owner, 0.1, lam=1.0, whiten=False)
    rewards = paid(scores, old, reference, owner, 0.1)
    for place in range(11):
        assert e.advantages[place] == pytest.approx(float(rewards[place:][owner[place:] == owner[place]].sum()))


def test_some_answers_of_an_experience():
    owner, old, reference, values, scores = batch()
    e = ppo_lm.experience(scores, old, reference, values, owner, 0.1)
    some = e.rows(torch.tensor([3, 2, 0]))
    assert some.owner.tolist() == [0] * 6 + [2] * 4
    places = [*range(5, 11), *range(4)]
    for name in ("old", "values", "advantages", "targets"):
        assert torch.equal(getattr(some, name), getattr(e, name)[places])


@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_each_answer_is_an_episode(lam):
    """Packed end to end as each alone through the op; whitening is over the tokens of the batch."""
    owner, old, reference, values, scores = batch()
    e = ppo_lm.experience(scores, old, reference, values, owner, 0.1, lam=lam, whiten=False)
    rewards = paid(scores, old, reference, owner, 0.1)
    for i in (0, 1, 3):
        r, v = rewards[owner == i][:, None], values[owner == i][:, None]
        over = torch.zeros_like(r, dtype=torch.bool)
        over[-1] = True
        alone, returns = ops.gae(r, v, torch.cat([v[1:], v[:1]]), over, torch.zeros_like(over), gamma=1.0, lam=lam)
        assert torch.allclose(e.advantages[owner == i], alone[:, 0], atol=1e-12)
        assert torch.allclose(e.targets[owner == i], returns[:, 0], atol=1e-12)
    white = ppo_lm.experience(scores, old, reference, values, owner, 0.1, lam=lam).advantages
    assert white.mean().abs() < 1e-12
    assert white.std() == pytest.approx(1)
    assert e.kl == pytest.approx(float((old - reference).sum()) / 3)


def test_the_losses_are_openrlhfs():
    """PolicyLoss and ValueLoss of openrlhf/models/loss.py, written out: −min(surr1, surr2) and half of the maximum."""
    owner, old, reference, values, scores = batch()
    e = ppo_lm.experience(scores, old, reference, values, owner, 0.1)
    g = torch.Generator().manual_seed(1)
    logprobs = (old + 0.4 * torch.randn(11, generator=g, dtype=torch.float64)).requires_grad_()
    now = (values + 0.4 * torch.randn(11, generator=g, dtype=torch.float64)).requires_grad_()
    found = ppo_lm.losses(logprobs, now, e)
    ratio = (logprobs - old).exp()
    policy = -torch.min(ratio * e.advantages, ratio.clamp(0.8, 1.2) * e.advantages).mean()
    near = values + (now - values).clamp(-0.2, 0.2)
    value = 0.5 * torch.max((near - e.targets) ** 2, (now - e.targets) ** 2).mean()
    assert torch.allclose(found.policy, policy, atol=1e-12)
    assert torch.allclose(found.value, value, atol=1e-12)
    assert 0 < found.clip_fraction < 1
    for mine, theirs in ((found.policy, policy), (found.value, value)):
        for leaf in (logprobs, now):
            a, b = (torch.autograd.grad(x, leaf, allow_unused=True, retain_graph=True)[0] for x in (mine, theirs))
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, atol=1e-12)


def test_micro_batches_have_the_gradient_of_the_batch():
    owner, old, reference, values, scores = batch()
    e = ppo_lm.experience(scores, old, reference, values, owner, 0.1)
    logprobs = (old + 0.1).requires_grad_()
    whole = torch.autograd.grad(ppo_lm.losses(logprobs, values, e).policy, logprobs)[0]
    total = torch.zeros_like(whole)
    for rows in (slice(0, 4), slice(4, 11)):
        part = ppo_lm.Experience(*(x[rows] for x in (owner, old, values, e.advantages, e.targets)), e.kl)
        loss = ppo_lm.losses(logprobs[rows], values[rows], part, tokens=11).policy
        total += torch.autograd.grad(loss, logprobs)[0]
    assert torch.allclose(total, whole, atol=1e-15)


def test_at_first_the_ratio_is_one_and_a_clip_of_zero_changes_nothing():
    owner, old, reference, values, scores = batch()
    e = ppo_lm.experience(scores, old, reference, values, owner, 0.1)
    logprobs = old.clone().requires_grad_()
    found = ppo_lm.losses(logprobs, values, e, clip=0.0)
    assert found.clip_fraction == found.approximate_kl == 0
    assert not torch.autograd.grad(found.policy, logprobs)[0].any()


def trained(problem, beta, updates=150, seed=0, scores=None):
    """The policy after PPO on an enumerated problem, with a value for each beginning, and the last batch's KL."""
    policy, g = problem.policy(), torch.Generator().manual_seed(seed)
    table = torch.zeros(problem.sequences.count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([*policy.parameters(), table], lr=0.05)
    sequences, reference = problem.sequences, problem.policy().token_logprobs().detach()
    scores = problem.rewards if scores is None else scores
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - update / updates)
        rows = policy.sample(512, g)
        mask = sequences.mask[rows]
        owner = torch.arange(len(rows))[:, None].expand_as(mask)[mask]
        nodes = sequences.nodes[rows][mask]
        with torch.no_grad():
            old = policy.token_logprobs(rows)[mask]
        e = ppo_lm.experience(scores[rows], old, reference[rows][mask], table[nodes].detach(), owner, beta)
        for _ in range(4):
            found = ppo_lm.losses(policy.token_logprobs(rows)[mask], table[nodes], e)
            optimizer.zero_grad()
            (found.policy + found.value).backward()
            optimizer.step()
    return policy


def test_it_ends_at_the_gibbs_optimum():
    """Sequences of one to three tokens, so that credit has to pass through the values."""
    problem = gibbs.Problem.random(torch.Generator().manual_seed(3), vocabulary=4, length=3, end=0)
    before = gibbs.kl(problem.reference_logprobs, problem.optimum(0.5))
    after = gibbs.kl(trained(problem, 0.5).sequence_logprobs().detach(), problem.optimum(0.5))
    assert before > 0.5
    assert after < 0.05


def test_without_reward_it_stays_at_the_reference():
    problem = gibbs.Problem.random(torch.Generator().manual_seed(3), vocabulary=4, length=3, end=0)
    policy = trained(problem, 0.5, updates=60, scores=torch.zeros_like(problem.rewards))
    assert gibbs.kl(policy.sequence_logprobs().detach(), problem.reference_logprobs) < 0.02


def test_the_controller_takes_its_kl():
    owner, _, reference, values, scores = batch()
    e = ppo_lm.experience(scores, reference + 4.0, reference, values, owner, 0.1)
    assert e.kl == pytest.approx(4.0 * 11 / 3)
    controller = kl.AdaptiveCoefficient(0.1, target=6.0, horizon=10_000)
    controller.update(12.0, 256)
    assert controller.value == pytest.approx(0.100512)
