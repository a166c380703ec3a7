"""The policy_gradient module: the estimate against torchrl and exact gradients, natural steps, the corridor, runs."""

import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch
from resumed import resumes_to_the_same_bytes

from finetune.errors import UserError
from finetune.rl.agents.networks import Categorical
from finetune.rl.envs.rollout import Rollout
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("policy_gradient")
pg = registry.load(INFO)
baselines, reinforce, trpo, corridor, enumerated, exact_cases, off_policy, variance = (
    registry.part("policy_gradient", name)
    for name in ("baselines", "reinforce", "trpo", "corridor", "enumerated", "exact_cases", "off_policy", "variance")
)


def toy(**changes):
    return dataclasses.replace(pg.Config.toy(), threads=1, **changes)


def two_episodes():
    """Rewards 1, 2, 4, cut off; and 8, terminated, then padding."""
    rewards = torch.tensor([[1.0, 8.0], [2.0, 0.0], [4.0, 0.0]])
    no = torch.zeros(3, 2, dtype=torch.bool)
    terminated, truncated = no.clone(), no.clone()
    terminated[0, 1] = truncated[2, 0] = True
    blank = torch.zeros(3, 2)
    return Rollout(blank, blank, rewards, blank, terminated, truncated)


# --- The estimate


def test_returns_and_baselines():
    rollout = two_episodes()
    advantages, returns = baselines.advantages(rollout, 0.5, "none")
    assert returns.tolist() == [[3.0, 8.0], [4.0, 0.0], [4.0, 0.0]]
    assert torch.equal(advantages, returns)
    advantages, _ = baselines.advantages(rollout, 0.5, "leave_one_out")
    assert advantages.tolist() == [[-5.0, 5.0], [4.0, 0.0], [4.0, 0.0]]
    advantages, _ = baselines.advantages(rollout, 0.5, "mean")
    assert advantages.tolist() == [[-2.5, 2.5], [2.0, 0.0], [2.0, 0.0]]


def test_a_learned_baseline_bootstraps_once_and_only_where_a_limit_cut():
    values, next_values = torch.full((3, 2), 10.0), torch.full((3, 2), 16.0)
    advantages, returns = baselines.advantages(two_episodes(), 0.5, "learned", values, next_values)
    assert returns.tolist() == [[5.0, 8.0], [8.0, 0.0], [12.0, 0.0]]
    assert advantages.tolist() == [[-5.0, -2.0], [-2.0, 0.0], [2.0, 0.0]]


@pytest.mark.slow
@pytest.mark.peer
def test_the_gradient_is_that_of_torchrls_reinforce_loss():
    pytest.importorskip("torchrl")
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.modules import ValueOperator
    from torchrl.objectives import ReinforceLoss

    torch.manual_seed(0)
    policy = Categorical(3, 4, [8])
    net = TensorDictModule(policy.net, in_keys=["observation"], out_keys=["logits"])
    sampler = ProbabilisticTensorDictModule(
        in_keys=["logits"], out_keys=["action"], distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )  # fmt: skip
    critic = ValueOperator(torch.nn.Linear(3, 1), in_keys=["observation"])
    loss = ReinforceLoss(ProbabilisticTensorDictSequential(net, sampler), critic)
    observations, actions, advantages = torch.randn(50, 3), torch.randint(4, (50,)), torch.randn(50)
    data = TensorDict(
        {"observation": observations, "action": actions, "advantage": advantages[:, None],
         "value_target": torch.zeros(50, 1), "next": {"reward": torch.zeros(50, 1)}}, [50]
    )  # fmt: skip
    loss(data)["loss_actor"].backward()
    theirs = [p.grad.clone() for p in policy.parameters()]
    log_probs = policy.log_prob(policy(observations), actions)
    mine = reinforce.policy_loss(log_probs, advantages, torch.ones(50)) / 50
    for a, b in zip(torch.autograd.grad(mine, list(policy.parameters())), theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def listed(seed):
    """A two-step process, its logits, all its trajectories with the world's probability, and ∇J."""
    mdp, logits = enumerated.process(np.random.default_rng(seed))
    rollout, world = enumerated.trajectories(mdp)
    return mdp, logits, rollout, world, enumerated.gradient(rollout, world, logits, mdp.gamma)


def performance(mdp, logits, steps=2):
    """J over `steps` steps, by dynamic programming."""
    policy, V = corridor.policy_of(mdp, logits), np.zeros(len(mdp.start))
    for _ in range(steps):
        V = (policy * (mdp.R + mdp.gamma * mdp.P @ V)).sum(1)
    return float(mdp.start @ V)


@pytest.mark.parametrize("seed", range(3))
def test_the_enumerated_gradient_is_that_of_dynamic_programming(seed):
    mdp, logits, rollout, world, gradient = listed(seed)
    assert float(enumerated.probabilities(rollout, world, logits).sum()) == pytest.approx(1, abs=1e-12)
    steps = 1e-5 * torch.eye(logits.numel(), dtype=torch.float64).view(-1, *logits.shape)
    differences = [(performance(mdp, logits + e) - performance(mdp, logits - e)) / 2e-5 for e in steps]
    assert np.allclose(gradient, differences, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_each_baseline_leaves_the_mean_and_only_that_of_the_batch_shrinks_it(seed):
    _, logits, rollout, world, _ = listed(seed)
    found = variance.listed(np.random.default_rng(seed), 20_000, 16)
    assert max(f.z for name, f in found.items() if name != "mean") < 4 < found["mean"].z
    assert found["mean"].ratio == pytest.approx((15 / 16) ** 2 * found["leave_one_out"].ratio)
    alone = variance.exact_variance(rollout, world, logits, 0.9, None)
    known = variance.exact_baselines(rollout, world, logits, 0.9)
    for name, baseline in {"none": None, **known}.items():
        exact = variance.exact_variance(rollout, world, logits, 0.9, baseline) / alone
        assert abs(found[name].ratio - exact) < 4 * found[name].error + 1e-9  # the error is what it says
        assert found[name].error < 0.1 * exact  # 1250 estimates of six numbers
    assert found["optimal"].ratio < min(found[name].ratio for name in ("none", "learned", "leave_one_out"))


def test_no_other_baseline_has_less_variance_than_the_optimal_one():
    _, logits, rollout, world, _ = listed(0)
    best = variance.exact_baselines(rollout, world, logits, 0.9)["optimal"]
    least = variance.exact_variance(rollout, world, logits, 0.9, best)
    for t, s in np.ndindex(*best.shape):
        for change in (-0.1, 0.1):
            other = best.clone()
            other[t, s] += change
            assert variance.exact_variance(rollout, world, logits, 0.9, other) > least


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_has_the_discount_and_the_usual_form_is_no_gradient(seed):
    mdp, logits, rollout, world, gradient = listed(seed)
    p, G = enumerated.probabilities(rollout, world, logits), enumerated.to_go(rollout, mdp.gamma)
    corrected = p @ enumerated.episode_gradients(rollout, logits, baselines.discounts(mdp.gamma, G) * G)
    assert torch.allclose(corrected, gradient, atol=1e-12)
    assert (enumerated.usual_form(rollout, world, logits, mdp.gamma) - gradient).norm() > 0.02 * gradient.norm()
    assert torch.allclose(enumerated.usual_form(rollout, world, logits, 1.0),
                          enumerated.gradient(rollout, world, logits, 1.0), atol=1e-12)  # fmt: skip

    def undiscounted(at):  # at γ = 1 both forms are the same
        return enumerated.usual_form(rollout, world, at, 1.0)

    assert enumerated.asymmetry(undiscounted, logits) < 1e-12
    assert enumerated.asymmetry(lambda at: enumerated.usual_form(rollout, world, at, mdp.gamma), logits) > 1e-3


def test_episode_gradients_are_autograds():
    _, logits, rollout, _, _ = listed(0)
    advantages = torch.randn(rollout.rewards.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = logits.clone().requires_grad_()
    loss = reinforce.policy_loss(enumerated.log_probs(rollout, theta), advantages, rollout.first_episode)
    assert torch.allclose(-torch.autograd.grad(loss, theta)[0].flatten(),
                          enumerated.episode_gradients(rollout, logits, advantages).sum(0), atol=1e-12)  # fmt: skip


# --- Off policy


@pytest.mark.parametrize("seed", range(3))
def test_only_trajectory_and_per_decision_weights_are_unbiased(seed):
    """Exactly: the expectation over all trajectories of μ."""
    mdp, logits, rollout, world, gradient = listed(seed)
    behavior = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    off = {}
    for weights in ("uncorrected", "step", "truncated", "trajectory", "per_decision"):
        found = off_policy.expectation(rollout, world, logits, behavior, mdp.gamma, weights, bound=1.2)
        off[weights] = float((found - gradient).norm() / gradient.norm())
    assert max(off["trajectory"], off["per_decision"]) < 1e-12
    assert min(off["uncorrected"], off["step"], off["truncated"]) > 0.01
    assert off["step"] < off["uncorrected"]


@pytest.mark.parametrize("seed", range(3))
def test_estimates_from_other_policies(seed):
    found = off_policy.compare(np.random.default_rng(seed), 30_000)
    assert max(b for weights in off_policy.UNBIASED for b in found[weights]["bias"]) < 1e-10
    assert max(z for weights in off_policy.UNBIASED for z in found[weights]["z"]) < 6
    assert min(found[weights]["z"][-1] for weights in ("uncorrected", "truncated", "weighted")) > 10
    for weights in off_policy.UNBIASED:
        assert found[weights]["variance"][-1] > 3 * found[weights]["variance"][0]
    effective = found["sample"]["effective"]
    assert effective[0] == pytest.approx(1)
    assert effective[-1] < effective[1] < 1


def test_each_importance_weight_by_hand():
    rewards, no = torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)
    log_ratios = torch.tensor([[4.0, 0.25], [2.0, 1.0]]).log()
    given = {
        weights: off_policy.weighted_returns(rewards, no, log_ratios, 0.5, weights) for weights in off_policy.WEIGHTS
    }
    assert torch.allclose(given["trajectory"], torch.tensor([[12.0, 0.375], [8.0, 0.25]]))
    assert torch.allclose(given["weighted"], given["trajectory"] / 4.125)
    assert torch.allclose(given["truncated"], torch.tensor([[3.0, 0.375], [2.0, 0.25]]))
    assert torch.allclose(given["per_decision"], torch.tensor([[8.0, 0.375], [8.0, 0.25]]))
    assert torch.allclose(given["step"], torch.tensor([[6.0, 0.375], [2.0, 1.0]]))
    assert off_policy.effective_sample_size(torch.tensor([[1.0, 1, 1, 1], [2, 0, 0, 0]])).tolist() == [4.0, 1.0]


@pytest.mark.parametrize("seed", range(3))
def test_a_reused_batch_needs_the_ratios(seed):
    ends = {
        weights: off_policy.reuse(np.random.default_rng(seed), weights)[-1]
        for weights in ("uncorrected", "per_decision")
    }
    assert ends["per_decision"] > ends["uncorrected"] + 0.05


def test_with_a_baseline_a_constant_on_the_rewards_changes_nothing():
    def learned(baseline, shift):
        return exact_cases.shifted(baseline, shift, [np.random.default_rng(i) for i in range(2)], 20)

    for baseline in ("mean", "leave_one_out"):
        assert abs(learned(baseline, 0.0) - learned(baseline, 100.0)).max() < 1e-10
    assert abs(learned("none", 0.0) - learned("none", 100.0)).max() > 0.01


# --- Natural steps


def test_conjugate_gradients_solve_and_the_fisher_product_is_the_fisher_matrix():
    torch.manual_seed(0)
    observations = torch.randn(40, 3, dtype=torch.float64)

    def distribution(theta):
        return (observations @ theta.view(3, 2)).log_softmax(-1)

    theta = torch.randn(6, dtype=torch.float64)
    product = trpo.fisher_product(distribution, Categorical.kl, theta, damping=0.1)
    F = torch.zeros(6, 6, dtype=torch.float64)
    probabilities = distribution(theta).exp()
    for a in range(2):
        scores = torch.autograd.functional.jacobian(lambda t, a=a: distribution(t)[:, a], theta)
        F += torch.einsum("n,ni,nj->ij", probabilities[:, a], scores, scores) / 40
    v = torch.randn(6, dtype=torch.float64)
    assert torch.allclose(product(v), F @ v + 0.1 * v, atol=1e-12)
    assert torch.allclose(product(trpo.conjugate_gradient(product, v, 20)), v, atol=1e-8)


def test_the_natural_gradient_does_not_depend_on_the_coordinates():
    for seed in range(3):
        invariant, plain = exact_cases.reparametrized(torch.Generator().manual_seed(seed))
        assert invariant < 1e-4
        assert plain > 0.1


def test_trpo_keeps_within_delta_and_raises_the_surrogate_or_stays():
    theta = torch.zeros(1)
    step = torch.ones(1)
    new, taken = trpo.line_search(lambda t: t.sum(), lambda t: t.square().sum(), theta, step, delta=0.3)
    assert taken == pytest.approx(0.8**3)
    assert new.square() <= 0.3
    new, taken = trpo.line_search(lambda t: -t.sum(), lambda t: t.square().sum(), theta, step, delta=0.3)
    assert (new.item(), taken) == (0.0, 0.0)


# --- The corridor


def test_the_corridor_is_that_of_sutton_and_barto():
    value = corridor.value_of
    assert value(0.05) == pytest.approx(-82.1, abs=0.1)
    assert value(0.95) == pytest.approx(-44.2, abs=0.1)
    assert value(corridor.BEST_RIGHT) == pytest.approx(-11.657, abs=1e-3)
    assert abs(corridor.BEST_RIGHT - 0.586) < 1e-3
    assert all(value(corridor.BEST_RIGHT) > value(corridor.BEST_RIGHT + d) for d in (-0.01, 0.01))


# --- Runs


@pytest.mark.slow
def test_the_toy_reaches_its_targets(tmp_path):
    summary = execute(INFO, toy(), tmp_path / "run", toy=True)
    assert summary["passed"], summary["reached"]
    for name in ("returns", "corridor", "off_policy", "variance"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": 12, "shuffle_advantages": True}, {"steps": 12, "lr": 0.0}])
def test_without_steps_advantages_or_rate_nothing_is_learned(change, tmp_path):
    config = toy(
        **{"corridor_steps": 0, "methods": "reinforce", "episodes": 8, "score_episodes": 1000, "variance_groups": 0}
        | change
    )
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    assert not summary["reached"]["return_reinforce"]
    assert summary["metrics"]["return_reinforce"] < 60


def test_a_cut_run_resumes(tmp_path, no_pictures):
    """Cut off in the second update of TRPO."""
    config = toy(steps=2, methods="reinforce,trpo", episodes=2, checkpoint_every=1, corridor_steps=0, eval_episodes=2,
                 score_episodes=1000, reuse=2, discount_correction=True, variance_groups=10)  # fmt: skip
    resumes_to_the_same_bytes(INFO, config, tmp_path, 4)


def test_continuous_actions_train_too(tmp_path):
    config = toy(steps=2, env="Pendulum-v1", methods="reinforce,trpo", episodes=2, corridor_steps=0, eval_episodes=2,
                 score_episodes=1000, variance_groups=0)  # fmt: skip
    found = execute(INFO, config, tmp_path / "run", toy=True)["metrics"]
    assert math.isfinite(found["return_trpo"])


@pytest.mark.long
@pytest.mark.parametrize("seed", [31, 32, 33])
def test_trpo_swings_the_pendulum_up(seed, tmp_path):
    """Gaussian actions. Untrained it earns about −1300."""
    config = dataclasses.replace(pg.Config(), seed=seed, threads=1, steps=60, env="Pendulum-v1", methods="trpo",
                                 gamma=0.95, corridor_steps=0, score_episodes=1000, variance_groups=0)  # fmt: skip
    summary = execute(INFO, config, tmp_path / "run")
    assert summary["baseline"]["return_trpo"] < -900
    assert summary["metrics"]["return_trpo"] > -400


@pytest.mark.long
def test_a_batch_used_four_times_is_worth_more(tmp_path):
    found = {}
    for reuse in (1, 4):
        config = dataclasses.replace(pg.Config(), seed=31, threads=1, steps=20, methods="reinforce", reuse=reuse,
                                     corridor_steps=0, score_episodes=1000, variance_groups=0)  # fmt: skip
        found[reuse] = execute(INFO, config, tmp_path / f"{reuse}")["metrics"]["return_reinforce"]
    assert found[4] > 1.5 * found[1]


class Broken(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), math.nan, True, False, {}


class Telling(Broken):
    observation_space = gymnasium.spaces.Text(5)


class Needy(Broken):
    def __init__(self):
        raise gymnasium.error.DependencyNotInstalled("it needs more\nthan is installed")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("CartPole-v9", "no environment 'CartPole-v9'; did you mean 'CartPole-v"),
        ("finetune/Needy-v0", "'finetune/Needy-v0' cannot be made: .*it needs more"),
        ("finetune/Telling-v0", "observations of Text"),
        ("finetune/Broken-v0", "gave the reward nan"),
    ],
)
def test_environments_that_do_not_serve_are_refused(env, message, tmp_path):
    for kind in (Broken, Telling, Needy):
        gymnasium.register(f"finetune/{kind.__name__}-v0", kind)
    with pytest.raises(UserError, match=message):
        execute(INFO, toy(env=env, corridor_steps=0), tmp_path / "run", toy=True)
    for kind in (Broken, Telling, Needy):
        del gymnasium.registry[f"finetune/{kind.__name__}-v0"]


def test_bad_settings_are_refused():
    for change, message in (
        ({"methods": "ppo"}, "--methods: 'ppo' is not one of"),
        ({"episodes": 1}, "--episodes 1 is too small"),
        ({"delta": 0.0}, "--delta 0 is too small: it must be above"),
        ({"ratio_bound": 0.0}, "--ratio-bound 0 is too small: it must be above"),
        ({"variance_groups": 5}, "--variance-groups 5 is too small"),
    ):
        with pytest.raises(UserError, match=message):
            toy(**change)
