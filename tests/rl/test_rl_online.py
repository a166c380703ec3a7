"""finetune.rl: vector environments, replay, networks, and targets and losses against torchrl."""

import copy

import gymnasium
import numpy as np
import pytest
import torch

from finetune.errors import UserError
from finetune.rl.agents import networks, targets
from finetune.rl.envs import environments, spaces
from finetune.rl.envs.replay import Priorities, Replay, Transitions
from finetune.rl.envs.vector import VectorEnv

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 0.5])


def rng():
    return torch.Generator().manual_seed(3)


# --- VectorEnv


class Counting(gymnasium.Env):
    """Observes (episode's draw, step, last action); ends after as many steps as the draw says, 3 to 8."""

    observation_space = gymnasium.spaces.Box(-100, 100, (3,))
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.t = int(self.np_random.integers(3, 9)), 0
        return np.array([self.length, 0, -1], np.float32), {}

    def step(self, action):
        self.t += 1
        obs = np.array([self.length + self.np_random.random(), self.t, action], np.float32)
        return obs, self.t + action, self.t == self.length, False, {}


@pytest.fixture
def counting():
    gymnasium.register("finetune/Counting-v0", Counting, max_episode_steps=6)
    yield lambda count: environments.make("finetune/Counting-v0", count)
    del gymnasium.registry["finetune/Counting-v0"]


def acting(actions, seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda observations: torch.randint(actions, (len(observations),), generator=g)


def test_a_rollout_shows_the_last_observation_of_an_end_and_goes_on_with_the_next_episode(counting):
    both = VectorEnv(counting(4), 7)
    r = both.collect(acting(3), 200)
    lengths, steps = r.observations[..., 0].floor(), r.next_observations[..., 1]
    assert torch.equal(r.next_observations[..., 0].floor(), lengths), "of the old episode, not of the new one"
    assert torch.equal(r.next_observations[..., 2], r.actions.float())
    assert torch.equal(r.rewards, steps + r.actions)
    assert torch.equal(r.terminated, (steps == lengths) & (lengths <= 6))
    assert torch.equal(r.truncated, (steps == 6) & (lengths > 6)), "what both ends at once is terminated"
    goes_on = ~r.ends[:-1]
    assert torch.equal(r.observations[1:][goes_on], r.next_observations[:-1][goes_on])
    assert (r.observations[1:][~goes_on][:, 1:] == torch.tensor([0.0, -1.0])).all()
    finished = both.pop_finished()
    assert both.pop_finished() == []
    assert sorted(n for _, n in finished) == sorted(r.next_observations[..., 1][r.ends].int().tolist())
    assert sum(x for x, _ in finished) + both.earned.sum() == r.rewards.sum()


def test_an_episode_is_a_function_of_seed_row_and_number(counting):
    def lengths(seed, rows, steps):
        r = VectorEnv(counting(rows), seed).collect(acting(3), steps)
        return [r.observations[:, i, 0].floor()[r.observations[:, i, 1] == 0].tolist() for i in range(rows)]

    whole, first = lengths(1, 3, 60), lengths(1, 2, 60)
    assert first == whole[:2]
    assert whole[0] != whole[1]
    assert lengths(2, 3, 60) != whole


@pytest.mark.parametrize(("name", "actions"), [("CartPole-v1", 2), ("Pendulum-v1", None), ("FrozenLake-v1", 4)])
def test_what_was_saved_goes_on_to_the_same_bytes(name, actions):
    def act(g):
        if actions:
            return lambda obs: torch.randint(actions, (len(obs),), generator=g)
        return lambda obs: 3 * torch.randn(len(obs), 1, generator=g)

    g = torch.Generator().manual_seed(0)
    first = VectorEnv(environments.make(name, 3), 5)
    first.collect(act(g), 333)
    saved, drawn = copy.deepcopy(first.state_dict()), g.get_state()
    other = VectorEnv(environments.make(name, 3), 5)
    other.collect(act(torch.Generator()), 40)
    other.load_state_dict(saved)
    h = torch.Generator()
    h.set_state(drawn)
    a, b = first.collect(act(g), 300), other.collect(act(h), 300)
    for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
        assert torch.equal(x, y)
    assert first.pop_finished() == other.pop_finished()
    assert np.array_equal(first.earned, other.earned)


def test_an_environment_that_does_not_repeat_itself_cannot_be_resumed():
    envs = environments.make("CartPole-v1", 1)
    both = VectorEnv(envs, 0)
    both.collect(acting(2), 5)
    saved = both.state_dict()
    envs[0].unwrapped.gravity = 5.0
    with pytest.raises(UserError, match="'CartPole-v1' does not repeat an episode"):
        both.load_state_dict(saved)


# --- Replay


def rows(first, count):
    n = torch.arange(first, first + count, dtype=torch.float32)
    return Transitions(n[:, None] + torch.tensor([0.0, 0.5]), n.long(), 10 * n, n[:, None] + 1, n % 2 == 0)


def test_the_ring_keeps_the_newest_and_samples_whole_rows_alike():
    ring = Replay(10)
    with pytest.raises(ValueError, match="nothing was added"):
        ring.sample(1, rng())
    for first in range(0, 12, 4):
        ring.add(rows(first, 4))
    assert len(ring) == 10
    got = ring.sample(20_000, rng())
    assert torch.equal(got.rewards, 10.0 * got.actions)
    assert torch.equal(got.observations[:, 1] + 0.5, got.next_observations[:, 0])
    assert torch.equal(got.terminated, got.actions % 2 == 0)
    counts = torch.bincount(got.actions, minlength=12)
    assert counts[:2].tolist() == [0, 0]
    assert abs(counts[2:] / 2000 - 1).max() < 0.12
    ring.add(rows(100, 25))
    assert sorted(ring.rows.actions.tolist()) == list(range(115, 125))


def test_a_ring_that_was_saved_goes_on_alike():
    ring, other = Replay(10), Replay(10)
    ring.add(rows(0, 7))
    other.load_state_dict(copy.deepcopy(ring.state_dict()))
    for each in (ring, other):
        each.add(rows(7, 8))
    for a, b in zip(ring.sample(50, rng()).columns(), other.sample(50, rng()).columns(), strict=True):
        assert torch.equal(a, b)


def test_a_ring_that_does_not_fit_is_refused_before_it_is_made():
    with pytest.raises(UserError, match=r"a replay of 1,000,000,000,000 transitions takes .* GiB, .* are free"):
        Replay(10**12).add(rows(0, 3))


@pytest.mark.parametrize("n", [1, 3, 40])
def test_transitions_of_n_steps_stop_at_ends_and_where_the_rollout_stops(counting, n):
    r, gamma = VectorEnv(counting(3), 0).collect(acting(3), 20), 0.9
    found = Transitions.n_step(r, n, gamma)
    assert r.terminated.any()
    assert r.truncated.any()
    for t in range(20):
        for i in range(3):
            total, last = 0.0, t
            for k in range(n):
                last = t + k
                total += gamma**k * float(r.rewards[last, i])
                if r.ends[last, i] or last == 19:
                    break
            row = found[t * 3 + i]
            assert row.rewards == pytest.approx(total, rel=1e-6)
            assert torch.equal(row.next_observations, r.next_observations[last, i])
            assert torch.equal(row.observations, r.observations[t, i])
            assert row.actions == r.actions[t, i]
            assert row.terminated == r.terminated[last, i]
            assert row.steps == last - t + 1
    ring, other = Replay(50), Replay(50)
    assert ring.add(found).tolist() == [x % 50 for x in range(10, 60)]
    other.load_state_dict(copy.deepcopy(ring.state_dict()))
    assert torch.equal(other.rows.steps, found.steps[torch.arange(10, 60)].roll(10))


# --- Priorities


def test_rows_are_drawn_in_proportion_to_their_priorities_and_weighted_back():
    """Two learners; of ten rows the first six are there. With β = 1 weighted means are those of uniform draws."""
    given = Priorities(2, 10, alpha=0.5, floor=0.01)
    given.add(torch.arange(6))
    rows, weights = given.sample(600, 1.0, rng())
    assert torch.equal(weights, torch.ones(2, 600)), "new rows are all alike"
    assert torch.bincount(rows[0], minlength=10)[:6].sub(100).abs().max() <= 1, "one from each of equal parts"
    errors = torch.tensor([[0.0, 1, -2, 3, 8, 24], [5.0, 5, 5, 5, 5, 0]])
    given.update(torch.arange(6).expand(2, 6), errors)
    p = (errors.abs() + 0.01).sqrt()
    rows, weights = given.sample(100_000, 1.0, rng())
    values = torch.arange(6.0) ** 2
    for learner in range(2):
        share = torch.bincount(rows[learner], minlength=10) / 100_000
        assert torch.allclose(share[:6], p[learner] / p[learner].sum(), atol=1e-4)
        assert share[6:].sum() == 0
        wanted = p[learner].min() / p[learner][rows[learner]]  # 1 / p, over the largest of the batch
        assert torch.allclose(weights[learner], wanted, rtol=1e-5)
        mean = (weights[learner] * values[rows[learner]]).sum() / weights[learner].sum()
        assert mean == pytest.approx(values.mean().item(), rel=1e-3)
    assert torch.equal(given.sample(50, 0.0, rng())[1], torch.ones(2, 50)), "β = 0 corrects nothing"
    given.add(torch.tensor([6]))
    assert torch.allclose(given.p[:, 6].float(), p.amax(1)), "a new row has the largest priority so far"
    other = Priorities(2, 10, alpha=0.5, floor=0.01)
    other.load_state_dict(copy.deepcopy(given.state_dict()))
    for a, b in zip(given.sample(20, 0.4, rng()), other.sample(20, 0.4, rng()), strict=True):
        assert torch.equal(a, b)


# --- Policies and values


def test_log_pi_is_the_density_of_the_action():
    """Its integral over the interval is 1, it is what sampling counts, and the inverse finds it again."""
    policy = networks.SquashedGaussian(2, [8], LOW[:1], HIGH[:1]).double()
    params = torch.tensor([0.4, -0.7], dtype=torch.float64)
    edges = torch.linspace(-2, 2, 20_001, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    density = policy.log_prob(params.expand(len(middles), 2), middles[:, None]).exp()
    assert density.sum() * (edges[1] - edges[0]) == pytest.approx(1, abs=1e-6)
    noise = torch.randn(200_000, 1, generator=rng(), dtype=torch.float64)
    actions, log_prob = policy.rsample(params.expand(len(noise), 2), noise)
    assert (actions < 0.5).double().mean() == pytest.approx(float(density[middles < 0.5].sum() / 5000), abs=5e-3)
    assert torch.allclose(policy.log_prob(params, actions), log_prob, atol=1e-8)
    assert actions.median() == pytest.approx(float(policy.mode(params)), abs=0.01)


def test_actions_keep_their_bounds_and_log_pi_stays_finite_where_tanh_rounds_to_one():
    policy = networks.SquashedGaussian(3, [8], LOW, HIGH)
    params = torch.tensor([[50.0, -50.0, 1.0, 1.0]], requires_grad=True)
    actions, log_prob = policy.rsample(params, torch.randn(1, 2, generator=rng()))
    assert torch.equal(actions, torch.stack([HIGH[:1], LOW[1:]], 1))
    log_prob.sum().backward()
    assert params.grad.isfinite().all()
    assert log_prob.item() == pytest.approx(2 * 100, rel=0.1), "log(1 − tanh² u) is about −2 |u|"
    obs = 100 * torch.randn(50, 3, generator=rng())
    fixed = networks.Deterministic(3, [8], LOW, HIGH)(obs)
    assert ((fixed >= LOW) & (fixed <= HIGH)).all()
    assert policy(obs).chunk(2, -1)[1].max() <= policy.LOG_STD_MAX
    assert policy.target_entropy == pytest.approx(np.log(2) + np.log(0.25) - 2)


def test_critics_are_separate_networks_and_broadcast():
    q = networks.TwinQ(3, 2, [16, 16], count=3).double()
    obs, actions = (torch.randn(5, n, generator=rng(), dtype=torch.float64) for n in (3, 2))
    for i in range(3):
        x = torch.cat([obs, actions], 1)
        for j, (w, b) in enumerate(zip(q.weights, q.biases, strict=True)):
            x = (x.relu() if j else x) @ w[i] + b[i]
        assert torch.allclose(q(obs, actions)[i], x[:, 0], atol=1e-12)
    many = q(obs[:, None], actions[None])
    assert many.shape == (3, 5, 5)
    assert torch.allclose(many[:, 2, 4], q(obs[2], actions[4]), atol=1e-12)
    (g,) = torch.autograd.grad(q(obs, actions)[1].sum(), q.weights[0])
    assert not g[0].any()
    assert g[1].any()


def test_polyak_is_the_weighted_mean():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    wanted = 0.9 * a.weight + 0.1 * b.weight
    targets.polyak_(a, b, 0.1)
    assert torch.allclose(a.weight, wanted)
    targets.polyak_(a, b, 1.0)
    assert torch.equal(a.bias, b.bias)


def test_bounds_are_those_of_the_environment():
    low, high = environments.action_bounds(environments.make("Pendulum-v1", 1)[0])
    assert (low.tolist(), high.tolist()) == ([-2.0], [2.0])
    with pytest.raises(UserError, match="'CartPole-v1' has actions of Discrete"):
        environments.action_bounds(environments.make("CartPole-v1", 1)[0])
    (env,) = environments.make("Pendulum-v1", 1)
    env.actions = spaces.actions(gymnasium.spaces.Box(-np.inf, np.inf, (1,)))
    with pytest.raises(UserError, match="actions without bounds"):
        environments.action_bounds(env)


# --- Against torchrl


class Peer:
    """The same weights in torchrl's words, in float64."""

    def __init__(self):
        import tensordict
        from tensordict.nn import TensorDictModule

        torch.manual_seed(0)
        self.q, self.old_q = (networks.TwinQ(3, 2, [8, 8]).double() for _ in range(2))
        g, many = rng(), (64,)
        self.batch = Transitions(
            torch.randn(64, 3, generator=g, dtype=torch.float64),
            LOW + (HIGH - LOW) * torch.rand(64, 2, generator=g, dtype=torch.float64),
            torch.randn(64, generator=g, dtype=torch.float64),
            torch.randn(64, 3, generator=g, dtype=torch.float64),
            torch.rand(64, generator=g) < 0.3,
        )
        b, over = self.batch, self.batch.terminated[:, None]
        after = {"reward": b.rewards[:, None], "observation": b.next_observations, "done": over, "terminated": over}
        self.data = tensordict.TensorDict({"observation": b.observations, "action": b.actions, "next": after}, many)
        net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(),
                                  torch.nn.Linear(8, 1)).double()  # fmt: skip

        class Critic(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, obs, action):
                return self.net(torch.cat([obs, action], -1))

        self.critic = TensorDictModule(Critic(), in_keys=["observation", "action"], out_keys=["state_action_value"])

    def fill(self, loss):
        for params, ours in (
            (loss.qvalue_network_params, self.q), (loss.target_qvalue_network_params, self.old_q)
        ):  # fmt: skip
            for i in range(3):
                layer = params.get(("module", "net", str(2 * i)))
                layer.get("weight").data.copy_(ours.weights[i].transpose(1, 2))
                layer.get("bias").data.copy_(ours.biases[i][:, 0])

    def noise(self, seed):
        torch.manual_seed(seed)
        return torch.randn(64, 2, dtype=torch.float64)


@pytest.mark.peer
def test_sac_is_torchrls():
    pytest.importorskip("torchrl")
    from tensordict.nn import InteractionType, TensorDictModule
    from torchrl.modules import ProbabilisticActor, TanhNormal
    from torchrl.objectives import SACLoss

    peer = Peer()
    policy = networks.SquashedGaussian(3, [8], LOW, HIGH).double()

    class Parameters(torch.nn.Module):
        def forward(self, obs):
            mean, log_std = policy(obs).chunk(2, -1)
            return mean, log_std.exp()

    actor = ProbabilisticActor(
        TensorDictModule(Parameters(), in_keys=["observation"], out_keys=["loc", "scale"]), in_keys=["loc", "scale"],
        distribution_class=TanhNormal, distribution_kwargs={"low": LOW.double(), "high": HIGH.double()},
        default_interaction_type=InteractionType.RANDOM,
    )  # fmt: skip
    loss = SACLoss(actor, peer.critic, loss_function="l2", alpha_init=0.3, target_entropy=-1.5)
    loss.make_value_estimator(gamma=0.5)  # a number that fp32, in which it is kept there, has exactly
    peer.fill(loss)

    b, alpha = peer.batch, loss.log_alpha.detach().exp()
    torch.manual_seed(1)
    theirs, _ = loss.qvalue_v2_loss(peer.data)
    params = policy(b.next_observations)
    actions, log_probs = policy.rsample(params, peer.noise(1))
    value = targets.soft_value(peer.old_q(b.next_observations, actions), log_probs, alpha)
    target = targets.td_target(b.rewards, value, b.terminated, 0.5)
    mine = targets.critic_loss(peer.q(b.observations, b.actions), target)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-10)
    torch.manual_seed(2)
    theirs, obs = loss.actor_loss(peer.data)
    actions, log_probs = policy.rsample(policy(b.observations), peer.noise(2))
    mine = targets.sac_policy_loss(peer.q(b.observations, actions), log_probs, alpha)
    assert torch.allclose(obs["log_prob"], log_probs, atol=1e-12)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-10)
    log_alpha = loss.log_alpha.detach()
    mine = targets.temperature_loss(log_alpha, log_probs, -1.5)
    assert mine.item() == pytest.approx(loss.alpha_loss(log_probs.detach()).mean().item(), rel=1e-10)


@pytest.mark.peer
def test_td3_is_torchrls():
    pytest.importorskip("torchrl")
    from tensordict.nn import TensorDictModule
    from torchrl.objectives import TD3Loss

    peer = Peer()
    policy, old = (networks.Deterministic(3, [8], LOW, HIGH).double() for _ in range(2))
    actor = TensorDictModule(policy, in_keys=["observation"], out_keys=["action"])
    loss = TD3Loss(actor, peer.critic, bounds=(LOW.double(), HIGH.double()), policy_noise=0.4, noise_clip=0.5,
                   loss_function="l2")  # fmt: skip
    loss.make_value_estimator(gamma=0.5)
    peer.fill(loss)
    for name, value in old.named_parameters():
        loss.target_actor_network_params.get(("module", *name.split("."))).data.copy_(value.detach())
    b = peer.batch
    torch.manual_seed(1)
    theirs, _ = loss.value_loss(peer.data)
    actions = targets.smoothed_actions(old(b.next_observations), 0.4 * peer.noise(1), 0.5, LOW, HIGH)
    value = peer.old_q(b.next_observations, actions).amin(0)
    target = targets.td_target(b.rewards, value, b.terminated, 0.5)
    mine = targets.critic_loss(peer.q(b.observations, b.actions), target)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-10)
    theirs, _ = loss.actor_loss(peer.data)
    mine = targets.td3_policy_loss(peer.q(b.observations, policy(b.observations)))
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-10)
