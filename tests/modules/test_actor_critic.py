"""The actor_critic module: losses beside torchrl, traces beside GAE, V-trace's lag, what the critic said, runs."""

import copy
import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from resumed import resumes_to_the_same_bytes

from finetune import ops
from finetune.errors import UserError
from finetune.rl.envs import environments
from finetune.rl.envs.replay import Transitions
from finetune.rl.envs.vector import VectorEnv
from finetune.runs import registry
from finetune.runs.run import Run, execute

INFO = registry.find("actor_critic")
module = registry.load(INFO)
critic, losses, networks, offpolicy, onpolicy, plots = (
    sys.modules[f"finetune_modules.actor_critic.{n}"]
    for n in ("critic", "losses", "networks", "offpolicy", "onpolicy", "plots")
)
learn = module.learn
QUICK = {"eval_episodes": 2, "hold": 1, "hold_steps": 1, "repeats": 1, "warmup": 60, "hidden": 8, "batch": 8,
         "continuous_hidden": 8}  # fmt: skip


def toy(**changes):
    return dataclasses.replace(module.Config.toy(), threads=1, **changes)


def learner(method, **changes):
    cfg = dataclasses.replace(module.Config(), **QUICK | changes)
    torch.manual_seed(0)
    if method in onpolicy.LEARNERS:
        return onpolicy.LEARNERS[method](cfg, method, VectorEnv(environments.make(cfg.env, 3), 0))
    return offpolicy.LEARNERS[method](cfg, method, VectorEnv(environments.make(cfg.continuous_env, 1), 0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- On-policy


@pytest.mark.parametrize("shared", [False, True])
def test_an_unfolded_horizon_knows_what_every_step_reached(shared):
    """V of the next row within an episode; at a truncation V of the last state of the old one, not of the new one."""
    model = learner("a2c", shared_trunk=shared).model
    rollout = VectorEnv(environments.make("CartPole-v1", 3, limit=15), 0).collect(onpolicy.drawn(model, seeded()), 40)
    assert rollout.truncated[:-1].any()
    assert rollout.terminated.any()
    with torch.no_grad():
        values = model(rollout.observations)[1]
        wanted = model.values(rollout.next_observations)
    found = onpolicy.following(model, rollout, values)
    counts = ~rollout.terminated
    assert torch.allclose(found[counts], wanted[counts], atol=1e-5)


@pytest.mark.peer
def test_a2cs_loss_and_gradient_are_torchrls():
    pytest.importorskip("torchrl")
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.modules import ValueOperator
    from torchrl.objectives import A2CLoss

    torch.manual_seed(0)
    model = networks.ActorCritic(3, 4, False, 8, False).double()
    model.policy.net[-1].weight.data.mul_(100)  # away from the uniform policy it begins with
    net = TensorDictModule(model.policy.net, in_keys=["observation"], out_keys=["logits"])
    draw = ProbabilisticTensorDictModule(
        in_keys=["logits"], out_keys=["action"], distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )  # fmt: skip
    value = ValueOperator(model.value.net, in_keys=["observation"])
    peer = A2CLoss(ProbabilisticTensorDictSequential(net, draw), value, critic_coeff=0.5, entropy_coeff=0.01,
                   loss_critic_type="l2")  # fmt: skip
    g = seeded()
    seen, psi, targets = (torch.randn(50, *shape, generator=g, dtype=torch.float64) for shape in ((3,), (), ()))
    actions = torch.randint(4, (50,), generator=g)
    data = TensorDict(
        {"observation": seen, "action": actions, "advantage": psi[:, None], "value_target": targets[:, None]}, [50]
    )
    parts = peer(data)
    theirs = parts["loss_objective"] + parts["loss_critic"] + parts["loss_entropy"]
    params, values = model(seen)
    weight = float(np.float32(0.01))  # as it is kept there
    given = model.policy.log_prob(params, actions), psi, values, targets, model.policy.entropy(params)
    mine, _ = losses.a2c_loss(*given, entropy_weight=weight)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-12)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (mine, theirs)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(("shared", "env"), [(False, "CartPole-v1"), (True, "CartPole-v1"), (True, "Pendulum-v1")])
def test_traces_sum_to_the_lambda_returns_gradient(shared, env):
    """Σ_t δ_t z_t = Σ_t ∇ · A^λ_t where nothing is learned meanwhile, over any ends; A^λ is the op gae's."""
    torch.manual_seed(0)
    envs = environments.make(env, 3)
    model = networks.ActorCritic(*environments.sizes(envs[0]), 8, shared).double()
    act = onpolicy.drawn(copy.deepcopy(model).float(), seeded())
    rollout = VectorEnv(envs, 0).collect(act, 250)
    r = type(rollout)(*(x.double() if x.is_floating_point() else x for x in vars(rollout).values()))
    assert r.ends[:-1].any()
    params, values = model(r.observations)
    after = onpolicy.following(model, r, values.detach())
    arguments = r.rewards, values.detach(), after, r.terminated, r.truncated
    psi, _ = ops.gae(*arguments, gamma=0.95, lam=0.8)
    goal = ((model.policy.log_prob(params, r.actions) + 0.3 * values) * psi).sum() / 3
    wanted = torch.autograd.grad(goal, list(model.parameters()))

    traces, total = losses.Traces(model, 3), [torch.zeros_like(p) for p in model.parameters()]
    deltas, _ = ops.gae(*arguments, gamma=0.95, lam=0.0)
    for t in range(250):
        traces.add(r.observations[t], r.actions[t], 0.95 * 0.8)
        torch._foreach_add_(total, traces.direction(deltas[t], 0.15))
        traces.end(r.ends[t])
    for a, b in zip(total, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_traces_without_decay_are_one_step_actor_critic():
    """λ = 0: the same parameters after some updates, as δ ∇V is the gradient of −½ δ² where the target is held."""
    after = []
    for method in ("one_step", "lambda"):
        one = learner(method, lam=0.0)
        one.chunk(30, 1.0, seeded())
        after.append(networks.flat(one.model))
    assert torch.allclose(*after, atol=1e-5)


def test_vtrace_acts_as_the_policy_of_so_many_updates_ago():
    one = learner("vtrace", lag=3, lr=0.01)
    seen = [networks.flat(one.model)]
    for _ in range(8):
        one.behaving(seeded())
        assert torch.equal(networks.flat(one.behavior), seen[max(0, len(seen) - 4)])
        one.chunk(1, 1.0, seeded(len(seen)))
        seen.append(networks.flat(one.model))


def test_vtrace_without_a_lag_is_a2c():
    after = []
    for method in ("a2c", "vtrace"):
        one = learner(method, lag=0)
        found = one.chunk(300, 1.0, seeded())
        after.append(networks.flat(one.model))
    assert found["ratio"] == pytest.approx(1, abs=1e-6)
    assert torch.allclose(*after, atol=1e-4)


# --- Off-policy


def test_sac_moves_every_part_in_its_own_direction():
    """A step on one batch: the critics towards their target, the policy up the critics, α up while entropy lacks, and
    the slow critics a little."""
    one = learner("sac", tau=0.1, continuous_hidden=32)
    g = seeded()
    batch = Transitions(*(torch.randn(256, n, generator=g) for n in (3, 1)), torch.zeros(256),
                        torch.randn(256, 3, generator=g), torch.ones(256, dtype=torch.bool))  # fmt: skip
    for optimizer in (one.policy_optimizer, one.q_optimizer):
        optimizer.param_groups[0]["lr"] = 1e-3
    slow = copy.deepcopy(one.slow_q)
    found = [one.update(batch, g) for _ in range(300)]
    assert found[-1]["q_loss"] < 0.1 * found[0]["q_loss"], "terminated, for nothing: Q is to become 0"
    entropies = [float(f["entropy"]) for f in found]
    below = [e < one.policy.target_entropy for e in entropies[:-1]]
    alphas = [float(f["alpha"]) for f in found]
    assert (alphas[1] > alphas[0]) == below[0]
    assert not torch.equal(slow.weights[0], one.slow_q.weights[0])


def test_td3_delays_its_policy_and_with_its_settings_off_is_ddpg():
    one = learner("td3", policy_delay=3, critics=1, target_noise=0.0, warmup=1)
    one.vector.step(torch.zeros(1, 1))
    moved = []
    for optimizer in (one.policy_optimizer, one.q_optimizer):
        optimizer.param_groups[0]["lr"] = 1e-3
    g = seeded()
    for _ in range(6):
        before = networks.flat(one.policy)
        batch = Transitions(*(torch.randn(8, n, generator=g) for n in (3, 1)), torch.ones(8),
                            torch.randn(8, 3, generator=g), torch.zeros(8, dtype=torch.bool))  # fmt: skip
        wanted = 1 + 0.99 * one.slow_q(batch.next_observations, one.slow_policy(batch.next_observations))[0]
        q = one.q(batch.observations, batch.actions)[0]
        found = one.update(batch, g)
        one.updates["count"] += 1
        assert found["q_loss"] == pytest.approx((q - wanted).square().mean().item(), rel=1e-5)
        moved.append(not torch.equal(before, networks.flat(one.policy)))
    assert moved == [True, False, False] * 2


# --- The critic beside what came


def test_what_came_is_the_mean_of_going_on_from_one_state():
    """CartPole pays 1 a step, and leaning away from the fall is a rule that needs no chance: all forks come to the same
    return, which a value that counts the steps to the end says before."""
    envs = environments.make("CartPole-v1", 20 * 3)

    def act(seen):
        return (seen[:, 2] > 0).long()

    said: list[torch.Tensor] = []
    pairs = critic.said_and_came(envs, act, lambda s: said.append(s) or s[:, 0], range(20), 0.9, seeded())
    rollout = environments.play(envs[:20], act, range(20))
    lengths = rollout.first_episode.sum(0)
    for n, state in enumerate(said[0]):
        at = int((rollout.observations[:, n] == state).all(-1).nonzero()[0])
        assert pairs[n, 1] == pytest.approx((1 - 0.9 ** int(lengths[n] - at)) / 0.1, rel=1e-5)
    assert len({float(x) for x in pairs[:, 1]}) > 5
    told = critic.Told.of(torch.stack([3 * pairs[:, 1] - 1, pairs[:, 1]], 1))
    assert (told.correlation, told.slope) == pytest.approx((1, 3))  # only the bias and the slope see that
    assert told.bias == pytest.approx(float(2 * pairs[:, 1].mean() - 1))


def test_steps_are_drawn_as_their_discount():
    u, lengths = torch.rand(100_000, generator=seeded(), dtype=torch.float64), torch.full((100_000,), 5)
    for gamma in (0.0, 0.7, 1.0):
        wanted = torch.tensor([gamma**t for t in range(5)])
        found = critic.geometric(u, lengths, gamma).bincount(minlength=5) / 100_000
        assert torch.allclose(found, wanted / wanted.sum(), atol=0.01)
    assert critic.geometric(torch.tensor([1 - 2**-53], dtype=torch.float64), torch.tensor([3]), 0.9) == 2


def test_from_the_state_on_actions_are_drawn_anew():
    """Of CartPole under coin flips: the mean of 400 continuations is that of episodes begun in the same state."""
    g = seeded()
    envs = environments.make("CartPole-v1", 400)

    def act(seen):
        return torch.randint(2, seen.shape[:1], generator=g)

    ((_, mean),) = critic.said_and_came(envs, act, lambda s: s[:, 0], [5], 1.0, seeded(), latest=1)
    alone = environments.play(envs, act, [5] * 400).rewards.sum(0)
    assert alone.std() > 5
    assert abs(mean - alone.mean()) < 4 * alone.std() * (2 / 400) ** 0.5


def test_a_soft_critic_is_compared_with_returns_and_their_entropy_bonus():
    """A bonus of 1 a step is a reward of 2 a step in all: what came doubles, state by state."""
    envs = environments.make("CartPole-v1", 20 * 3)

    def pairs(bonus):
        act = lambda s: (s[:, 2] > 0).long()  # noqa: E731
        return critic.said_and_came(envs, act, lambda s: s[:, 0], range(20), 0.9, seeded(), bonus=bonus)

    plain, paid = pairs(None), pairs(lambda seen, _: torch.ones(seen.shape[:2]))
    assert torch.allclose(paid[:, 1], 2 * plain[:, 1])


def test_sac_says_the_soft_value_and_pays_its_entropy():
    config = toy(continuous_hidden=8)
    place = module.Place(config, True, environments.EpisodeLimit())
    sac = offpolicy.SAC(config, "sac", VectorEnv(place.learning, 0))
    with torch.no_grad():
        sac.log_alpha.fill_(math.log(0.3))
    sac.rewards.see(torch.tensor([2 * offpolicy.LARGEST]))  # 1 of the critics' unit is 2 of the environment's
    states = torch.randn(5, 3, generator=seeded())
    generator = seeded(1)
    params = sac.policy(states.repeat(20_000, 1))
    actions, log_probs = sac.policy.rsample(params, torch.randn(len(params), 1, generator=generator))
    soft = sac.q(states.repeat(20_000, 1), actions).amin(0) - 0.3 * log_probs
    assert torch.allclose(sac.values(states, draws=20_000), 2 * soft.view(-1, 5).mean(0), atol=0.04)
    paid = sac.bonus(states.expand(4000, 5, 3), generator)
    assert torch.allclose(paid.mean(0), -0.6 * log_probs.view(-1, 5).mean(0), atol=0.06)


def test_a_world_that_does_not_repeat_itself_is_refused():
    envs = environments.make("CartPole-v1", 4)
    plain = envs[1].unwrapped.step
    envs[1].unwrapped.step = lambda action: plain(1 - action)
    with pytest.raises(UserError, match="does not repeat an episode from its seed"):
        critic.said_and_came(envs, lambda s: (s[:, 2] > 0).long(), lambda s: s[:, 0], [3], 0.9, seeded(2))


@pytest.mark.slow
def test_the_critic_of_a_held_policy_knows_what_comes(tmp_path, without_pictures, monkeypatch):
    """The trainings themselves are left out: a policy that still fails, held, and its critic beside what came."""
    monkeypatch.setattr(module, "learn", lambda *x: learn(*x) if x[0].phase.startswith("a2c_held") else None)
    summary = execute(INFO, module.Config(methods="a2c", eval_episodes=2, seed=31), tmp_path / "run")
    assert summary["reached"]["critic_correlation_a2c"], summary["metrics"]


# --- Runs


@pytest.fixture
def few_states(monkeypatch):
    monkeypatch.setattr(module, "STATES", 3)
    monkeypatch.setattr(module, "FORKS", 2)


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(Run, "curves", lambda self: None)
    for name in ("learning", "critics", "temperature"):
        monkeypatch.setattr(plots, name, lambda *_: None)


@pytest.mark.slow
def test_the_toy_reaches_its_targets(tmp_path):
    summary = execute(INFO, toy(), tmp_path / "run", toy=True)
    assert summary["passed"], summary["reached"]
    for name in ("returns", "critics", "temperature"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("change", [{"shuffle": True}, {"lr": 0.0}])
def test_without_advantages_or_rate_nothing_is_learned(change, tmp_path, without_pictures):
    config = toy(steps=60, methods="a2c", hold_steps=0, **change)
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    assert not summary["reached"]["return_a2c"]
    assert summary["metrics"]["return_a2c"] < 60  # it drifts, but not to where a pole stands


def test_a_cut_run_resumes(tmp_path, monkeypatch, without_pictures, few_states):
    monkeypatch.setattr(module, "CHUNK", 40)
    config = toy(**QUICK | {"steps": 3, "methods": "lambda,vtrace,sac,td3", "checkpoint_every": 2})
    resumes_to_the_same_bytes(INFO, config, tmp_path, 9)


def test_without_steps_the_policies_are_as_they_began(tmp_path, without_pictures):
    config = toy(**QUICK | {"steps": 0, "methods": ",".join(module.METHODS)})
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    for method in module.METHODS:
        name = f"return_{method}"
        assert summary["metrics"][name] == summary["baseline"][name]
        assert not summary["reached"][name]


def test_on_policy_methods_take_continuous_actions(tmp_path, without_pictures, few_states):
    config = toy(**QUICK | {"steps": 2, "methods": "a2c,lambda,vtrace", "env": "Pendulum-v1"})
    assert np.isfinite(execute(INFO, config, tmp_path / "run", toy=True)["metrics"]["return_vtrace"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env": "CartPole-v9"}, "no environment 'CartPole-v9'; did you mean 'CartPole-v"),
        ({"continuous_env": "CartPole-v1", "methods": "sac"}, "'CartPole-v1' has actions of Discrete"),
        ({"methods": "ppo"}, "--methods: 'ppo' is not one of one_step, a2c"),
        ({"horizon": 0}, "--horizon 0 is too small"),
        ({"tau": 1.5}, "--tau 1.5 is too large: it must be at most 1"),
        ({"alpha": 0.0}, "--alpha 0 is too small: it must be above 0"),
        ({"clip": 0.0}, "--clip 0 is too small: it must be above 0"),
    ],
)
def test_bad_settings_are_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        execute(INFO, toy(**change), tmp_path / "run", toy=True)
