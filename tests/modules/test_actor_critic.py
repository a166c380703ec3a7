"""The actor_critic module: each algorithm against its definition and torchrl, the critic check, runs."""

import copy
import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch
from seeds import THREE

from finetune import ops
from finetune.errors import UserError
from finetune.rl.agents.learner import Learner
from finetune.rl.envs import environments
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.replay import Transitions
from finetune.rl.envs.vector import VectorEnv
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("actor_critic")
module = registry.load(INFO)
a2c, traces, vtrace, sac, critic_check = (
    registry.part("actor_critic", name) for name in ("a2c", "actor_critic_lambda", "vtrace", "sac", "critic_check")
)
QUICK = {"eval_episodes": 2, "freeze_after": 1, "critic_steps": 1, "critic_states": 3, "critic_episodes": 2,
         "repeats": 1, "warmup": 60, "hidden": 8, "batch": 8, "continuous_hidden": 8}  # fmt: skip


def toy(**changes):
    return dataclasses.replace(module.Config.toy(), threads=1, **changes)


def new_agent(method, **changes):
    cfg = dataclasses.replace(module.Config(), **QUICK | changes)
    torch.manual_seed(0)
    if method in module.ON_POLICY:
        return module.ON_POLICY[method](cfg, VectorEnv(environments.make(cfg.env, 3), 0))
    return module.OFF_POLICY[method](cfg, VectorEnv(environments.make(cfg.continuous_env, 1), 0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("method", module.METHODS)
def test_a_restored_agent_continues_with_the_same_numbers(method):
    """After two chunks its state goes into a new agent; the third chunk is the same of both, to the bit."""
    first, other = new_agent(method), new_agent(method, env="CartPole-v1")
    for chunk in range(2):
        first.train_for(80, 1.0, seeded(chunk))
    saved = copy.deepcopy({k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in first.state.items()})
    for name, part in other.state.items():
        if hasattr(part, "load_state_dict"):
            part.load_state_dict(saved[name])
        else:
            for key, value in saved[name].items():
                part[key].data.copy_(value) if torch.is_tensor(value) else part.__setitem__(key, value)
    assert first.train_for(80, 1.0, seeded(2)) == other.train_for(80, 1.0, seeded(2))
    networks = [name for name, part in first.state.items() if isinstance(part, torch.nn.Module)]
    assert networks
    for name in networks:
        assert torch.equal(vtrace.flat(first.state[name]), vtrace.flat(other.state[name])), name
    assert isinstance(first, Learner)


# --- On-policy


@pytest.mark.parametrize("shared", [False, True])
def test_next_values_are_those_of_the_state_that_each_step_reached(shared):
    """V of the next row within an episode; at a truncation V of the last state of the old one, not of the new one."""
    agent, rng = new_agent("a2c", shared_trunk=shared), seeded()
    model = agent.model
    rollout = VectorEnv(environments.make("CartPole-v1", 3, limit=15), 0).collect(lambda obs: agent.act(obs, rng), 40)
    assert rollout.truncated[:-1].any()
    assert rollout.terminated.any()
    with torch.no_grad():
        values = model(rollout.observations)[1]
        wanted = model.values(rollout.next_observations)
    found = a2c.next_state_values(model, rollout, values)
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
    model = a2c.ActorCritic(3, 4, False, 8, False).double()
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
    obs, advantages, targets = (torch.randn(50, *shape, generator=g, dtype=torch.float64) for shape in ((3,), (), ()))
    actions = torch.randint(4, (50,), generator=g)
    data = TensorDict(
        {"observation": obs, "action": actions, "advantage": advantages[:, None], "value_target": targets[:, None]},
        [50],
    )
    parts = peer(data)
    theirs = parts["loss_objective"] + parts["loss_critic"] + parts["loss_entropy"]
    params, values = model(obs)
    weight = float(np.float32(0.01))  # as it is kept there
    given = model.policy.log_prob(params, actions), advantages, values, targets, model.policy.entropy(params)
    mine, _ = a2c.a2c_loss(*given, entropy_weight=weight)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-12)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (mine, theirs)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(("shared", "env"), [(False, "CartPole-v1"), (True, "CartPole-v1"), (True, "Pendulum-v1")])
def test_traces_sum_to_the_lambda_returns_gradient(shared, env):
    """Σ_t δ_t z_t = Σ_t ∇ · A^λ_t where nothing is learned meanwhile, over any ends; A^λ is the op gae's."""
    torch.manual_seed(0)
    envs = environments.make(env, 3)
    model = a2c.ActorCritic(*environments.sizes(envs[0]), 8, shared).double()
    actor, rng = copy.deepcopy(model).float(), seeded()
    rollout = VectorEnv(envs, 0).collect(lambda obs: actor.policy.sample(actor.distribution(obs), rng), 250)
    r = type(rollout)(*(x.double() if x.is_floating_point() else x for x in vars(rollout).values()))
    assert r.ends[:-1].any()
    params, values = model(r.observations)
    after = a2c.next_state_values(model, r, values.detach())
    arguments = r.rewards, values.detach(), after, r.terminated, r.truncated
    advantages, _ = ops.gae(*arguments, gamma=0.95, lam=0.8)
    goal = ((model.policy.log_prob(params, r.actions) + 0.3 * values) * advantages).sum() / 3
    wanted = torch.autograd.grad(goal, list(model.parameters()))

    z, total = traces.Traces(model, 3), [torch.zeros_like(p) for p in model.parameters()]
    deltas, _ = ops.gae(*arguments, gamma=0.95, lam=0.0)
    for t in range(250):
        z.add(r.observations[t], r.actions[t], 0.95 * 0.8)
        torch._foreach_add_(total, z.direction(deltas[t], 0.15))
        z.reset(r.ends[t])
    for a, b in zip(total, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_traces_without_decay_are_one_step_actor_critic():
    """λ = 0: the same parameters after some updates, as δ ∇V is the gradient of −½ δ² with a constant target."""
    after = []
    for method in ("one_step", "lambda"):
        one = new_agent(method, lam=0.0)
        one.train_for(30, 1.0, seeded())
        after.append(vtrace.flat(one.model))
    assert torch.allclose(*after, atol=1e-5)


def test_vtrace_acts_with_the_policy_of_lag_updates_ago():
    one = new_agent("vtrace", lag=3, lr=0.01)
    past = [vtrace.flat(one.model)]
    for _ in range(8):
        one.collect(seeded())
        assert torch.equal(vtrace.flat(one.behavior), past[max(0, len(past) - 4)])
        one.train_for(1, 1.0, seeded(len(past)))
        past.append(vtrace.flat(one.model))


def test_vtrace_without_a_lag_is_a2c():
    after = []
    for method in ("a2c", "vtrace"):
        one = new_agent(method, lag=0)
        found = one.train_for(300, 1.0, seeded())
        after.append(vtrace.flat(one.model))
    assert found["ratio"] == pytest.approx(1, abs=1e-6)
    assert torch.allclose(*after, atol=1e-4)


# --- Off-policy


def test_sac_moves_every_part_in_its_own_direction():
    """A step on one batch: the critics towards their target, the policy up the critics, α up while entropy lacks, and
    the slow critics a little."""
    one = new_agent("sac", tau=0.1, continuous_hidden=32)
    g = seeded()
    batch = Transitions(*(torch.randn(256, n, generator=g) for n in (3, 1)), torch.zeros(256),
                        torch.randn(256, 3, generator=g), torch.ones(256, dtype=torch.bool))  # fmt: skip
    for optimizer in (one.policy_optimizer, one.q_optimizer):
        optimizer.param_groups[0]["lr"] = 1e-3
    slow = copy.deepcopy(one.target_q)
    found = [one.update(batch, g) for _ in range(300)]
    assert found[-1]["q_loss"] < 0.1 * found[0]["q_loss"], "terminated, for nothing: Q is to become 0"
    entropies = [float(f["entropy"]) for f in found]
    below = [e < one.policy.target_entropy for e in entropies[:-1]]
    alphas = [float(f["alpha"]) for f in found]
    assert (alphas[1] > alphas[0]) == below[0]
    assert not torch.equal(slow.weights[0], one.target_q.weights[0])


def test_td3_delays_its_policy_and_with_its_settings_off_is_ddpg():
    one = new_agent("td3", policy_delay=3, critics=1, target_noise=0.0, warmup=1)
    one.envs.step(torch.zeros(1, 1))
    moved = []
    for optimizer in (one.policy_optimizer, one.q_optimizer):
        optimizer.param_groups[0]["lr"] = 1e-3
    g = seeded()
    for _ in range(6):
        before = vtrace.flat(one.policy)
        batch = Transitions(*(torch.randn(8, n, generator=g) for n in (3, 1)), torch.ones(8),
                            torch.randn(8, 3, generator=g), torch.zeros(8, dtype=torch.bool))  # fmt: skip
        wanted = 1 + 0.99 * one.target_q(batch.next_observations, one.target_policy(batch.next_observations))[0]
        q = one.q(batch.observations, batch.actions)[0]
        found = one.update(batch, g)
        assert found["q_loss"] == pytest.approx((q - wanted).square().mean().item(), rel=1e-5)
        moved.append(not torch.equal(before, vtrace.flat(one.policy)))
    assert moved == [True, False, False] * 2


# --- Critic check


def test_the_return_of_a_state_is_the_mean_of_episodes_that_continue_from_it():
    """CartPole pays 1 a step and this policy draws nothing: all episodes from a state earn the same return, which is
    known from the number of steps to the end."""
    envs = environments.make("CartPole-v1", 20 * 3)

    def policy(obs):
        return (obs[:, 2] > 0).long()

    states: list[torch.Tensor] = []
    pairs = critic_check.values_and_returns(
        envs, policy, lambda s: states.append(s) or s[:, 0], range(20), 0.9, seeded()
    )
    rollout = environments.play(envs[:20], policy, range(20))
    lengths = rollout.first_episode.sum(0)
    for n, state in enumerate(states[0]):
        at = int((rollout.observations[:, n] == state).all(-1).nonzero()[0])
        assert pairs[n, 1] == pytest.approx((1 - 0.9 ** int(lengths[n] - at)) / 0.1, rel=1e-5)
    assert len({float(x) for x in pairs[:, 1]}) > 5
    found = critic_check.Agreement.of(torch.stack([3 * pairs[:, 1] - 1, pairs[:, 1]], 1))
    assert (found.correlation, found.slope) == pytest.approx((1, 3)), "only the bias and the slope see that"
    assert found.bias == pytest.approx(float(2 * pairs[:, 1].mean() - 1))


def test_steps_are_chosen_in_proportion_to_their_discount():
    u, lengths = torch.rand(100_000, generator=seeded(), dtype=torch.float64), torch.full((100_000,), 5)
    for gamma in (0.0, 0.7, 1.0):
        wanted = torch.tensor([gamma**t for t in range(5)])
        found = critic_check.discounted_step(u, lengths, gamma).bincount(minlength=5) / 100_000
        assert torch.allclose(found, wanted / wanted.sum(), atol=0.01)
    assert critic_check.discounted_step(torch.tensor([1 - 2**-53], dtype=torch.float64), torch.tensor([3]), 0.9) == 2


def test_actions_are_sampled_again_from_the_state_on():
    """CartPole under coin flips: the mean of 400 continuations is that of 400 episodes that begin in the same state."""
    g = seeded()
    envs = environments.make("CartPole-v1", 400)

    def act(obs):
        return torch.randint(2, obs.shape[:1], generator=g)

    ((_, mean),) = critic_check.values_and_returns(envs, act, lambda s: s[:, 0], [5], 1.0, seeded(), latest=1)
    alone = environments.play(envs, act, [5] * 400).rewards.sum(0)
    assert alone.std() > 5
    assert abs(mean - alone.mean()) < 4 * alone.std() * (2 / 400) ** 0.5


def test_a_soft_critic_is_compared_with_returns_and_their_entropy_bonus():
    """With a bonus of 1 a step every step pays 2: the returns double, state by state."""
    envs = environments.make("CartPole-v1", 20 * 3)

    def pairs(bonus):
        act = lambda s: (s[:, 2] > 0).long()  # noqa: E731
        return critic_check.values_and_returns(envs, act, lambda s: s[:, 0], range(20), 0.9, seeded(), bonus=bonus)

    plain, paid = pairs(None), pairs(lambda obs, _: torch.ones(obs.shape[:2]))
    assert torch.allclose(paid[:, 1], 2 * plain[:, 1])


def test_the_value_of_sac_is_soft_and_its_bonus_the_entropys():
    agent = new_agent("sac")
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.3))
    agent.rewards.see(torch.tensor([2 * sac.LARGEST_REWARD]))  # 1 in the critics is 2 of the environment's rewards
    states, rng = torch.randn(5, 3, generator=seeded()), seeded(1)
    many = states.repeat(20_000, 1)
    actions, log_probs = agent.policy.rsample(agent.policy(many), torch.randn(len(many), 1, generator=rng))
    soft = agent.q(many, actions).amin(0) - 0.3 * log_probs
    found = critic_check.soft_state_values(agent, states, samples=20_000)
    assert torch.allclose(found, 2 * soft.view(-1, 5).mean(0), atol=0.04)
    bonus = critic_check.entropy_bonus(agent, states.expand(4000, 5, 3), rng)
    assert torch.allclose(bonus.mean(0), -0.6 * log_probs.view(-1, 5).mean(0), atol=0.06)


def test_a_world_that_does_not_repeat_itself_is_refused():
    envs = environments.make("CartPole-v1", 4)
    plain = envs[1].unwrapped.step
    envs[1].unwrapped.step = lambda action: plain(1 - action)
    with pytest.raises(UserError, match="does not repeat an episode from its seed"):
        critic_check.values_and_returns(envs, lambda s: (s[:, 2] > 0).long(), lambda s: s[:, 0], [3], 0.9, seeded(2))


@pytest.mark.long
def test_the_critic_of_a_frozen_policy_predicts_returns(tmp_path, no_pictures, monkeypatch):
    """Only the second training runs: a policy that still fails, frozen, and the check of its critic."""
    chunk = module.train_chunk
    monkeypatch.setattr(module, "train_chunk", lambda *x: chunk(*x) if x[0].phase.startswith("a2c_held") else None)
    summary = execute(INFO, module.Config(methods="a2c", eval_episodes=2, repeats=3, seed=31), tmp_path / "run")
    assert summary["checks"]["critic_correlation_a2c"]["passed"], summary["checks"]


# --- Runs


@pytest.mark.slow
@pytest.mark.parametrize("seed", THREE)
def test_the_toy_reaches_its_targets(seed, tmp_path):
    summary = execute(INFO, toy(seed=seed), tmp_path / "run", toy=True)
    assert summary["passed"], (summary["reached"], summary["checks"])
    for name in ("returns", "critics", "temperature"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 10_000


# Chunks of 200 environment steps, and the share of the way from random actions to a good policy that they must reach.
SCALED = [pytest.param("a2c", 120, 0.2)]
SCALED += [pytest.param(m, n, share, marks=pytest.mark.long)
           for m, n, share in (("one_step", 200, 0.1), ("lambda", 200, 0.1), ("vtrace", 150, 0.1), ("sac", 30, 0.35),
                               ("td3", 30, 0.35))]  # fmt: skip


@pytest.mark.parametrize("factor", [100.0, 0.01])
@pytest.mark.parametrize(("method", "chunks", "share"), SCALED)
def test_rewards_in_another_unit_are_learned_as_well(method, chunks, share, factor):
    name = "CartPole-v1" if method in module.ON_POLICY else "Pendulum-v1"
    gymnasium.register(
        "finetune/Scaled-v0", lambda: gymnasium.wrappers.TransformReward(gymnasium.make(name), lambda r: factor * r)
    )
    try:
        agent = new_agent(method, env="finetune/Scaled-v0", continuous_env="finetune/Scaled-v0", hidden=64, batch=128,
                          continuous_hidden=128, warmup=500)  # fmt: skip
        for chunk in range(chunks):
            agent.train_for(200, 1 - 0.9 * chunk / chunks, seeded(chunk))
        rng, test = seeded(9), environments.make("finetune/Scaled-v0", 20)
        policy = agent.greedy if method in module.OFF_POLICY else lambda obs: agent.act(obs, rng)
        mean = np.mean(returns(test, policy, range(20))) / factor
    finally:
        del gymnasium.registry["finetune/Scaled-v0"]
    low, high = module.RETURN_RANGE[name]
    assert mean > low + share * (high - low), mean


@pytest.mark.parametrize("change", [{"shuffle": True}, {"lr": 0.0}])
def test_without_advantages_or_rate_nothing_is_learned(change, tmp_path, no_pictures):
    config = toy(steps=60, methods="a2c", critic_steps=0, **change)
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    assert not summary["reached"]["return_a2c"]
    assert summary["metrics"]["return_a2c"] < 60  # it drifts, but not to where a pole stands


def test_without_steps_the_policies_are_as_they_began(tmp_path, no_pictures):
    config = toy(**QUICK | {"steps": 0, "methods": ",".join(module.METHODS)})
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    for method in module.METHODS:
        name = f"return_{method}"
        assert summary["metrics"][name] == summary["baseline"][name]
        assert not summary["reached"][name]


def test_on_policy_methods_take_continuous_actions(tmp_path, no_pictures):
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


def test_an_environment_that_does_not_repeat_is_trained_without_a_check_of_its_critic(tmp_path, no_pictures, capsys):
    class Unseeded(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Box(0, 1, (3,)), gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            self.age = 0
            return np.random.rand(3).astype(np.float32), {}

        def step(self, action):
            self.age += 1
            return np.random.rand(3).astype(np.float32), 1.0, self.age == 9, False, {}

    gymnasium.register("finetune/Unseeded-v0", Unseeded)
    info = registry.find("actor_critic")
    changes = {"env": "finetune/Unseeded-v0", "methods": "a2c", "steps": 2, "eval_episodes": 2, "envs": 2}
    try:
        summary = execute(info, dataclasses.replace(module.Config.toy(), **changes), tmp_path / "run", toy=True)
    finally:
        del gymnasium.registry["finetune/Unseeded-v0"]
    assert summary["metrics"] == {"return_a2c": 9}
    assert not [name for name in summary["checks"] if name.startswith("critic")]
    assert capsys.readouterr().out.count("does not repeat an episode from its seed") == 1
