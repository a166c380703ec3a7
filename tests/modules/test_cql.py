"""The cql module: losses, targets and gradients against d3rlpy and torchrl, its limits (α = 0) and variants, runs."""

import copy
import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from known_tasks import GAMMA, check_learned_alone, continuous_log, continuous_value, tabular_log, world
from learner_state import continues_from_its_state
from seeds import THREE
from summaries import numbers

from finetune.errors import UserError
from finetune.rl.agents.networks import QNetwork, SquashedGaussian, TwinQ
from finetune.rl.agents.targets import double_dqn_target, gather_actions, polyak_
from finetune.rl.envs import logged_data
from finetune.rl.envs.replay import Transitions
from finetune.rl.tabular import mdp as tables
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("cql")
cql = registry.load(INFO)
discrete, continuous = (registry.part("cql", name) for name in ("cql_discrete", "cql_continuous"))


def toy(**changes):
    return dataclasses.replace(cql.Config.toy(), **changes)


def small(**changes):
    """Runs that are only to run."""
    fast = {"steps": 4, "updates": 5, "data_steps": 400, "fqe_steps": 2, "eval_every": 2, "eval_episodes": 2}
    return toy(**{**fast, "checkpoint_every": 2, "hidden": 8, "sets": "random"} | changes)


def steps_of(count, actions=None, seed=0):
    """Transitions of 4 numbers; `actions`: the number of kinds, or two continuous numbers."""
    g = torch.Generator().manual_seed(seed)
    taken = torch.randint(actions, (count,), generator=g) if actions else torch.rand(count, 2, generator=g) * 2 - 1
    seen, after = (torch.randn(count, 4, generator=g) for _ in range(2))
    return Transitions(seen, taken, torch.randn(count, generator=g), after, torch.rand(count, generator=g) < 0.2)


def learner(alpha, seed=0, actions=3, **changes):
    torch.manual_seed(seed)
    network = QNetwork(4, actions, [16, 16])
    return discrete.CQL(network, **{"alpha": alpha, "gamma": 0.9, "lr": 1e-2, "tau": 0.1} | changes)


def actor_critic(alpha, seed=0, **changes):
    torch.manual_seed(seed)
    actor = SquashedGaussian(4, [16, 16], torch.full((2,), -1.0), torch.full((2,), 1.0))
    settings = {"alpha": alpha, "gamma": 0.9, "lr": 1e-3, "tau": 0.1, "samples": 6}
    return continuous.CQL(actor, TwinQ(4, 2, [16, 16]), **settings | changes)


# --- Discrete


def test_alpha_zero_is_double_dqn_bit_for_bit():
    mine, batches = learner(0.0), [steps_of(32, 3, seed) for seed in range(20)]
    network = copy.deepcopy(mine.q)
    target, optimizer = copy.deepcopy(network), torch.optim.Adam(network.parameters(), lr=1e-2, fused=True)
    conservative = learner(0.5)
    for b in batches:
        mine.update(b)
        conservative.update(b)
        with torch.no_grad():
            best = network(b.next_observations).argmax(1)
            after = target(b.next_observations)[torch.arange(32), best]
            wanted = b.rewards + 0.9 * torch.where(b.terminated, 0.0, after)
        loss = torch.nn.functional.smooth_l1_loss(network(b.observations).gather(1, b.actions[:, None])[:, 0], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        polyak_(target, network, 0.1)
    for a, b, c in zip(mine.q.parameters(), network.parameters(), conservative.q.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_the_gap_is_not_negative_and_its_gradient_is_the_policy_less_the_data():
    values = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(3, (50,))
    gap = discrete.cql_h(values, actions)
    assert bool((gap > 0).all())
    (gradient,) = torch.autograd.grad(gap.sum(), values)
    wanted = values.softmax(-1) - torch.nn.functional.one_hot(actions, 3)
    assert torch.allclose(gradient, wanted, atol=1e-12)


def test_cql_rho_is_the_maximum_over_policies_near_rho_and_cql_h_less_a_constant_for_the_uniform():
    g = torch.Generator().manual_seed(0)
    values, prior = (torch.randn(20, 4, generator=g, dtype=torch.float64) for _ in range(2))
    log_prior, actions = prior.log_softmax(-1), torch.zeros(20, dtype=torch.long)

    def objective(log_mu):
        return (log_mu.exp() * (values - (log_mu - log_prior))).sum(-1)

    soft = discrete.cql_rho(values, actions, log_prior) + values[:, 0]
    assert torch.allclose(objective((values + log_prior).log_softmax(-1)), soft, atol=1e-12)
    for _ in range(20):
        assert (objective(torch.randn(20, 4, generator=g, dtype=torch.float64).log_softmax(-1)) <= soft).all()
    uniform = torch.full((20, 4), -math.log(4), dtype=torch.float64)
    assert torch.allclose(
        discrete.cql_rho(values, actions, uniform), discrete.cql_h(values, actions) - math.log(4), atol=1e-12
    )


def test_lagrange_raises_alpha_above_the_threshold_and_lowers_it_below():
    batch = steps_of(64, 3)
    for threshold, direction in ((0.1, 1), (3.0, -1)):
        one = learner(1.0, threshold=threshold)
        for _ in range(5):
            one.update(batch)
        assert direction * (one.alpha - 1) > 0.01
    log_alpha = torch.zeros(2, requires_grad=True)
    discrete.lagrange_loss(log_alpha, torch.tensor([3.0, 1.0]), 2.0).backward()
    assert log_alpha.grad.tolist() == [-0.5, 0.5]


# --- Continuous


def test_the_sampled_logsumexp_finds_the_integral():
    """∫ exp Q da over a bounded interval, by samples of the uniform, of π(s) and of π(s')."""
    torch.manual_seed(0)
    policy = SquashedGaussian(3, [8], torch.tensor([-2.0]), torch.tensor([2.0]))
    params, after = torch.tensor([[0.3, -0.5]]), torch.tensor([[-0.8, 0.1]])
    n = 40_000
    uniform, noise = torch.rand(n, 1, 1), torch.randn(2, n, 1, 1)
    actions, density = continuous.sample_actions(policy, params, after, uniform, noise)
    assert actions.shape == (3 * n, 1, 1)
    grid = torch.linspace(-2, 2, 20_001)

    def q(a):
        return torch.sin(3 * a) + a

    exact = math.log(float(q(grid).exp().mean() * 4))
    for part in range(3):
        rows = slice(part * n, part * n + n)
        found = continuous.importance_logsumexp(q(actions[None, rows, :, 0]), density[rows]) - math.log(n)
        assert found.item() == pytest.approx(exact, abs=0.05)
    found = continuous.importance_logsumexp(q(actions[None, :, :, 0]), density) - math.log(3 * n)
    assert found.item() == pytest.approx(exact, abs=0.03)


def test_cal_ql_pushes_the_policys_actions_down_no_further_than_the_returns():
    one, batch = actor_critic(1.0), steps_of(16)
    candidates, density = torch.rand(9, 16, 2) * 2 - 1, torch.zeros(9, 16)
    low, high = torch.full((16,), -100.0), torch.full((16,), 100.0)

    def gap(**more):
        return continuous.conservative_gap(one.critics, batch.observations, batch.actions, candidates, density, **more)[
            0
        ]

    assert torch.equal(gap(returns_to_go=low), gap())
    calibrated = gap(returns_to_go=high)
    (gradient,) = torch.autograd.grad(calibrated.sum(), one.critics.biases[-1])
    assert calibrated.min() > 90
    assert torch.allclose(gradient, torch.full_like(gradient, -1.0)), "only the data's actions have a gradient left"


def test_alpha_zero_is_an_update_of_sac():
    one, batch = actor_critic(0.0), steps_of(16)
    policy, q, target = (copy.deepcopy(part) for part in (one.actor, one.critics, one.target))
    noise = torch.randn(20, 16, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        after, log_after = policy.rsample(policy(batch.next_observations), noise[0])
        soft = target(batch.next_observations, after).min(0).values - 0.1 * log_after
        wanted = batch.rewards + 0.9 * (1 - batch.terminated.float()) * soft

    def descend(module, loss):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    descend(q, sum(((values - wanted) ** 2).mean() for values in q(batch.observations, batch.actions)))
    actions, log_probs = policy.rsample(policy(batch.observations), noise[7])
    descend(policy, (0.1 * log_probs - q(batch.observations, actions).min(0).values).mean())
    one.update(batch, torch.Generator().manual_seed(0))
    for mine, theirs in ((one.critics, q), (one.actor, policy)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert not torch.allclose(one.actor.net[0].weight, actor_critic(0.0).actor.net[0].weight, atol=1e-4)


def test_the_variants_differ_and_none_matters_at_alpha_zero():
    batches = [dataclasses.replace(steps_of(16, seed=seed), returns_to_go=torch.zeros(16)) for seed in range(3)]

    def trained(**changes):
        one = actor_critic(**{"alpha": 0.0} | changes)
        for i, batch in enumerate(batches):
            one.update(batch, torch.Generator().manual_seed(i))
        return torch.cat([p.detach().flatten() for p in (*one.critics.parameters(), *one.actor.parameters())])

    sac = trained()
    assert torch.equal(sac, trained(calibrated=True, rho=True))
    variants = [trained(alpha=1.0, **more) for more in (
        {}, {"rho": True}, {"calibrated": True}, {"backup": "plain"}, {"backup": "max"}, {"threshold": 1.0},
        {"warm_start": 3},
    )]  # fmt: skip
    for i, one in enumerate([sac, *variants]):
        assert one.isfinite().all()
        assert not any(torch.equal(one, other) for other in variants[i:])


def test_the_backups_are_their_definitions():
    batch, noise = steps_of(8), torch.randn(7, 8, 2)
    for backup in ("soft", "plain", "max"):
        one = actor_critic(1.0, backup=backup)
        params = one.actor(batch.next_observations)
        actions, log_probs = one.actor.rsample(params, noise)
        values = one.target(batch.next_observations, actions).amin(0)
        wanted = {"max": values.amax(0), "plain": values[0], "soft": values[0] - 0.1 * log_probs[0]}[backup]
        target = batch.rewards + torch.where(batch.terminated, 0.0, 0.9 * wanted)
        assert torch.allclose(one.td_targets(batch, params, noise), target, atol=1e-6)


def test_a_warm_start_clones():
    torch.manual_seed(0)
    batch = dataclasses.replace(steps_of(64), actions=torch.full((64, 2), 0.5))
    cloned, other = (actor_critic(1.0, lr=1e-2, warm_start=n) for n in (60, 0))
    for i in range(60):
        for one in (cloned, other):
            one.update(batch, torch.Generator().manual_seed(i))
    error = [(one.act(batch.observations) - 0.5).abs().mean().item() for one in (cloned, other)]
    assert error[0] < 0.1 < error[1]


# --- Peers


def d3(config, actions, kind):
    """A d3rlpy learner of 4 observations with networks of [16, 16]."""
    pytest.importorskip("d3rlpy")
    import d3rlpy

    encoder = d3rlpy.models.VectorEncoderFactory([16, 16])
    made = config(encoder).create(device="cpu:0")
    made.create_impl((4,), actions)
    assert type(made.impl).__name__ == kind
    return made.impl


def d3_batch(batch, to_go=None):
    from d3rlpy.torch_utility import TorchMiniBatch

    n = len(batch)
    actions = batch.actions if batch.actions.is_floating_point() else batch.actions[:, None]
    return TorchMiniBatch(
        batch.observations, actions, batch.rewards[:, None], batch.next_observations, actions,
        torch.zeros(n, 1) if to_go is None else to_go[:, None], batch.terminated.float()[:, None], torch.ones(n, 1),
        "cpu:0",
    )  # fmt: skip


def linears(module):
    return [m for m in module.modules() if isinstance(m, torch.nn.Linear)]


@pytest.mark.slow
@pytest.mark.peer
def test_discrete_losses_targets_and_gradients_are_d3rlpys():
    """fp32 on both sides: sums of some 16 terms of size 1, so a few units in the last place (1e-6) apart."""
    d3rlpy = pytest.importorskip("d3rlpy")
    impl = d3(lambda e: d3rlpy.algos.DiscreteCQLConfig(encoder_factory=e, alpha=0.7, gamma=0.9), 3, "DiscreteCQLImpl")
    one, batch = learner(0.7), steps_of(256, 3)
    for network, theirs in ((one.q, impl._modules.q_funcs[0]), (one.target, impl._modules.targ_q_funcs[0])):
        torch.nn.init.normal_(network.net[-1].weight)
        for a, b in zip(linears(network), linears(theirs), strict=True):
            b.load_state_dict(a.state_dict())
    given = d3_batch(batch)
    target = impl.compute_target(given)
    found = impl.compute_loss(given, target)
    td, gap, _ = one.loss(batch)
    assert abs(td - found.td_loss) < 1e-5 * td
    assert abs(gap - found.conservative_loss) < 1e-5 * gap
    found.loss.backward()
    mine = torch.autograd.grad(td + 0.7 * gap, list(one.q.parameters()))
    theirs = [p.grad for layer in linears(impl._modules.q_funcs[0]) for p in (layer.weight, layer.bias)]
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.peer
def test_the_discrete_gap_is_torchrls():
    pytest.importorskip("torchrl")
    from tensordict import TensorDict
    from torchrl.data import OneHot
    from torchrl.modules import QValueActor
    from torchrl.objectives import DiscreteCQLLoss

    one, batch = learner(1.0), steps_of(64, 3)
    actor = QValueActor(module=copy.deepcopy(one.q), in_keys=["observation"], spec=OneHot(3))
    loss = DiscreteCQLLoss(actor, loss_function="l2", delay_value=True)
    loss.make_value_estimator(gamma=0.9)
    data = TensorDict(
        {"observation": batch.observations, "action": torch.nn.functional.one_hot(batch.actions, 3),
         "next": {"observation": batch.next_observations, "reward": batch.rewards[:, None],
                  "done": batch.terminated[:, None], "terminated": batch.terminated[:, None]}}, [64],
    )  # fmt: skip
    found = {name: float(value.detach()) for name, value in loss(data).items() if "loss" in name}
    values = one.q(batch.observations)
    after = one.q(batch.next_observations)
    wanted = double_dqn_target(after, after, batch.rewards, batch.terminated, 0.9)
    taken = gather_actions(values, batch.actions)
    assert found["loss_cql"] == pytest.approx(discrete.cql_h(values, batch.actions).mean().item(), rel=1e-5)
    assert found["loss_qvalue"] == pytest.approx(0.5 * (taken - wanted).square().mean().item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_continuous_gap_is_d3rlpys_on_the_same_noise(calibrated, monkeypatch):
    """fp32; a logsumexp over 18 samples and the mean over 32 rows, so 1e-5 of values of size 1."""
    d3rlpy = pytest.importorskip("d3rlpy")
    kind = d3rlpy.algos.CalQLConfig if calibrated else d3rlpy.algos.CQLConfig
    impl = d3(
        lambda e: kind(actor_encoder_factory=e, critic_encoder_factory=e, n_action_samples=6, conservative_weight=1.0,
                       alpha_threshold=0.0, gamma=0.9), 2, "CalQLImpl" if calibrated else "CQLImpl",
    )  # fmt: skip
    one, batch, to_go = actor_critic(1.0), steps_of(32), 0.2 * torch.randn(32)
    with torch.no_grad():
        ours, theirs = linears(one.actor), linears(impl._modules.policy)
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            b.load_state_dict(a.state_dict())
        for rows, b in zip((slice(0, 2), slice(2, 4)), (impl._modules.policy._mu, impl._modules.policy._logstd),
                           strict=True):  # fmt: skip
            b.weight.copy_(ours[2].weight[rows])
            b.bias.copy_(ours[2].bias[rows])
        for i, q in enumerate(impl._modules.q_funcs):
            for layer, weight, bias in zip(linears(q), one.critics.weights, one.critics.biases, strict=True):
                layer.weight.copy_(weight[i].T)
                layer.bias.copy_(bias[i, 0])
    noise, uniform = torch.randn(2, 6, 32, 2), torch.rand(6, 32, 2)
    draws = iter(noise)
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *_, **__: next(draws))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.copy_(
        low + (high - low) * uniform.transpose(0, 1).reshape(self.shape)))  # fmt: skip
    given = d3_batch(batch, to_go)
    wanted = impl._compute_conservative_loss(given.observations, given.actions, given.next_observations,
                                             given.returns_to_go)  # fmt: skip
    params = one.actor(batch.observations), one.actor(batch.next_observations)
    parts = continuous.sample_actions(one.actor, *params, uniform, noise)
    found, _ = continuous.conservative_gap(
        one.critics, batch.observations, batch.actions, *parts, returns_to_go=to_go if calibrated else None
    )
    assert torch.allclose(found, wanted, atol=1e-5)
    mine = torch.autograd.grad(found.sum(), list(one.critics.weights))
    wanted.sum().backward()
    for i, q in enumerate(impl._modules.q_funcs):
        for layer, gradient in zip(linears(q), mine, strict=True):
            assert torch.allclose(layer.weight.grad, gradient[i].T, atol=1e-5)


# --- Runs


@pytest.mark.slow
@pytest.mark.parametrize("seed", THREE)
def test_the_toy_reaches_its_targets(seed, tmp_path):
    summary = execute(INFO, toy(seed=seed), tmp_path / "run", toy=True)
    assert summary["passed"], (summary["reached"], summary["checks"])
    assert len(summary["metrics"]) <= 6, "headline results"
    for name in ("returns", "gaps", "values"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}, {"shuffle_actions": True}])
@pytest.mark.usefixtures("no_pictures")
def test_without_steps_rate_or_the_data_nothing_is_learned(change, tmp_path):
    config = small(**{"sets": "expert", "steps": 10, "updates": 50, "data_steps": 20_000, "eval_episodes": 5,
                      "eval_every": 10} | change)  # fmt: skip
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    assert summary["metrics"]["return_expert_cql"] < 120
    assert not summary["reached"]["return_expert_cql"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("factor", [100.0, pytest.param(0.01, marks=pytest.mark.long)])
def test_an_experts_steps_teach_in_any_unit_of_rewards(factor, tmp_path):
    """The bars of the toy on `expert`, with the rewards of its steps × 100 and × 0.01."""
    made = logged_data.generate("CartPole-v1", "expert", 2000, 0)
    dataclasses.replace(made, rewards=made.rewards * factor).save(tmp_path / "log.npz")
    config = toy(data=tmp_path / "log.npz", fqe_steps=0, eval_every=24)
    found = numbers(execute(INFO, config, tmp_path / "run", toy=True))
    assert found["return_data_cql"] >= 500 / 2
    assert found["return_data_naive"] <= 500 / 4


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_a_learner_continues_from_its_state(threshold):
    """Fresh ones have other weights; α is learned where there is a threshold."""
    seeds = iter(range(100))
    continues_from_its_state(lambda: learner(1.0, next(seeds), threshold=threshold), steps_of(16, 3))
    continues_from_its_state(lambda: actor_critic(1.0, next(seeds), threshold=threshold, warm_start=4), steps_of(16))


@pytest.mark.usefixtures("no_pictures")
def test_own_data_is_learned_from(tmp_path):
    logged_data.generate("Pendulum-v1", "medium", 200, 0).save(tmp_path / "own.npz")
    config = small(data=tmp_path / "own.npz", env="Pendulum-v1")
    found = numbers(execute(INFO, config, tmp_path / "run", toy=True))
    assert math.isfinite(found["return_data_cql"])


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_unit_of_rewards_changes_nothing_that_is_learned(env, tmp_path, capsys):
    """A power of two, to the last bit; believed values of such rewards are not compared with the environment's."""
    made, found = logged_data.generate(env, "medium", 600, 0), {}
    for factor in (1.0, 2.0**-7):
        dataclasses.replace(made, rewards=made.rewards * factor).save(tmp_path / f"{factor}.npz")
        config = small(data=tmp_path / f"{factor}.npz", env=env)
        found[factor] = numbers(execute(INFO, config, tmp_path / f"run{factor}", toy=True))
        assert ("the two are not compared" in capsys.readouterr().out) == (factor != 1)
        assert ("overestimate_data_cql" in found[factor]) == (factor == 1)
    for name, value in found[2.0**-7].items():
        assert value == found[1.0][name], name


# --- A log alone


ALONE = {"env": "none", "hidden": 32, "updates": 50, "steps": 6, "fqe_steps": 8, "gamma": GAMMA,
         "gamma_continuous": GAMMA, "alpha": 0.1, "alpha_continuous": 0.1, "lr": 1e-2, "samples": 3}  # fmt: skip


@pytest.fixture
def kept(monkeypatch):
    """The learners of the last run."""
    found, judge = {}, cql.judge

    def spy(cfg, run, task, learners):
        found.update(learners)
        return judge(cfg, run, task, learners)

    monkeypatch.setattr(cql, "judge", spy)
    return found


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_log_alone_teaches_more_than_its_policy_by_fqe_and_in_truth(seed, tmp_path, kept):
    mdp = world(seed)
    policy = tables.uniform(mdp)
    tabular_log(tmp_path / "log.npz", mdp, policy, seed=seed)
    config = small(**ALONE | {"data": tmp_path / "log.npz", "seed": seed})
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    check_learned_alone(summary, kept, mdp, policy, "cql", lambda name: f"fqe_data_{name}")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_a_log_alone_of_continuous_actions_too(seed, tmp_path, kept):
    behavior = continuous_log(tmp_path / "log.npz", seed=seed)
    config = small(**ALONE | {"data": tmp_path / "log.npz", "seed": seed})
    found = numbers(execute(INFO, config, tmp_path / "run", toy=True))
    assert found["fqe_data_behavior"] == pytest.approx(behavior, abs=0.15 * abs(behavior))
    for name in ("cql", "naive"):
        truth = continuous_value(kept[name].act)
        assert truth > behavior / 2
        assert found[f"fqe_data_{name}"] == pytest.approx(truth, abs=0.15 * abs(behavior)), name


@pytest.mark.usefixtures("no_pictures")
def test_a_run_from_a_log_alone_resumes_to_the_same_result(tmp_path):
    tabular_log(tmp_path / "log.npz", world(0), tables.uniform(world(0)), episodes=50)
    config = small(**ALONE | {"data": tmp_path / "log.npz", "steps": 4, "updates": 5, "fqe_steps": 4})
    whole = execute(INFO, config, tmp_path / "whole", toy=True)
    execute(INFO, config, tmp_path / "cut", toy=True)
    for name in ("summary.json", "checkpoints/data_fqe/step_000004"):
        path = tmp_path / "cut" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = execute(INFO, config, tmp_path / "cut", toy=True, resume=True)
    assert again["metrics"] == whole["metrics"]
    assert again["checks"] == whole["checks"]


def test_a_log_that_never_earns_anything_is_no_failure(tmp_path):
    """Pictures included: every return is 0, whatever the learners believe."""
    tabular_log(tmp_path / "log.npz", world(0), tables.uniform(world(0)), episodes=20)
    arrays = dict(np.load(tmp_path / "log.npz"))
    np.savez(tmp_path / "log.npz", **arrays | {"rewards": 0 * arrays["rewards"], "actions": arrays["actions"] % 2})
    for env in ("none", "FrozenLake-v1"):
        found = numbers(execute(INFO, small(data=tmp_path / "log.npz", env=env), tmp_path / env, toy=True))
        assert found["fqe_data_cql" if env == "none" else "return_data_cql"] == pytest.approx(0, abs=0.5)


@pytest.mark.usefixtures("no_pictures")
def test_a_log_of_one_episode_is_judged_by_itself_and_it_is_said(tmp_path, capsys):
    made = logged_data.generate("CartPole-v1", "expert", 100, 0)
    made.save(tmp_path / "log.npz")
    config = small(data=tmp_path / "log.npz", env="none")
    found = numbers(execute(INFO, config, tmp_path / "run", toy=True))
    assert math.isfinite(found["fqe_data_cql"])
    assert "it holds one episode: policies are judged by the steps that they learned from" in capsys.readouterr().out


def test_bad_settings_and_data_are_refused(tmp_path):
    for change, message in (
        ({"sets": "expret"}, "--sets: 'expret' is not one of .*did you mean 'expert'"),
        ({"gamma": 1.5}, "--gamma 1.5 is too large: it must be below 1"),
        ({"gamma_continuous": 1.0}, "--gamma-continuous 1 is too large: it must be below 1"),
        ({"batch": 1}, "--batch 1 is too small"),
        ({"sets": "expert,expert"}, "'expert' is there twice"),
        ({"updates": 10**12}, "--updates .* is too large"),
        ({"threshold": 1.0, "alpha": 0.0}, "--threshold learns"),
        ({"env": "Acrobot-v1"}, "--env Acrobot-v1 says where the steps of --data come from"),
        ({"states": 3}, "--states is for learning from a log alone"),
        ({"data": tmp_path / "x.npz", "env": "none", "fqe_steps": 0}, "fitted Q evaluation is the only judge"),
        ({"data": tmp_path / "x.npz", "env": "none", "env_arg": ("a=1",)}, "--env-arg is for the environment of"),
        ({"data_format": "hdf"}, "--data-format 'hdf' is not one of auto, columns"),
    ):
        with pytest.raises(UserError, match=message):
            toy(**change)
    np.savez(tmp_path / "bad.npz", observations=np.zeros((3, 4)))
    logged_data.generate("Pendulum-v1", "random", 200, 0).save(tmp_path / "other.npz")
    for name, message in (
        ("bad", "bad.npz: it has no actions, rewards, terminations, truncations"),
        (
            "other",
            "other: actions are continuous, those of CartPole-v1 discrete .*--env none: learn from the log alone",
        ),
        ("none", "none.npz: there is no such file"),
    ):
        with pytest.raises(UserError, match=message):
            execute(INFO, small(data=tmp_path / f"{name}.npz"), tmp_path / f"run_{name}", toy=True)


def test_scores_are_measured_by_the_sets_themselves():
    for env, (random, expert) in cql.SCORE_RANGE.items():
        for quality, wanted in (("random", random), ("expert", expert)):
            found = np.mean(logged_data.generate(env, quality, 6000, 7).returns())
            assert found == pytest.approx(wanted, abs=0.12 * abs(expert - random))
