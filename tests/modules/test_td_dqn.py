"""DQN of the td_learning module: losses equal to torchrl's and d3rlpy's, learners that do not mix, what is learned."""

import copy

import pytest
import torch

from finetune.rl.agents.targets import gather_actions, td_loss
from finetune.rl.envs import environments
from finetune.rl.envs.replay import Transitions
from finetune.rl.envs.vector import VectorEnv
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("td_learning")
main = registry.load(INFO)
dqn = registry.part("td_learning", "dqn")


def made(name, count=1, **settings):
    """Learners with a target network of its own, and a batch of steps with ends, some of two and three steps."""
    torch.manual_seed(0)
    envs = VectorEnv(environments.make("CartPole-v1", count), 0)
    one = dqn.DQN(dqn.VARIANTS[name], envs, count, dqn.Settings(reward_scale=1.0, gamma=0.9, **settings))
    for parameter in [*one.q.parameters(), *one.target.parameters()]:
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    g = torch.Generator().manual_seed(1)
    n, steps = (count, 200), torch.randint(1, 4, (count, 200), generator=g)
    found = Transitions(
        torch.randn(*n, 4, generator=g), torch.randint(2, n, generator=g), torch.randn(n, generator=g),
        torch.randn(*n, 4, generator=g), torch.rand(n, generator=g) < 0.2,
        steps if one.variant.n > 1 else torch.ones_like(steps),
    )  # fmt: skip
    return one, found


class Single(torch.nn.Module):
    """Networks of which there is one, without the first size."""

    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, observations):
        return self.q(observations[None])[0]


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name", ["dqn", "double", "dueling", "n_step"])
def test_losses_and_gradients_of_dqn_are_torchrls(name):
    pytest.importorskip("torchrl")
    from tensordict import TensorDict
    from torchrl.data import OneHot
    from torchrl.modules import QValueActor
    from torchrl.objectives import DQNLoss

    one, batch = made(name)

    def actor(q):
        return QValueActor(module=Single(q), in_keys=["observation"], spec=OneHot(2))

    theirs = DQNLoss(actor(copy.deepcopy(one.target)), loss_function="smooth_l1", delay_value=True,
                     double_dqn=one.variant.double)  # fmt: skip
    theirs.value_network_params.data.copy_(TensorDict.from_module(actor(one.q)).data)  # the target stays
    theirs.make_value_estimator(gamma=0.9)
    flat = Transitions(*(column[0] for column in batch.columns()))
    data = TensorDict(
        {"observation": flat.observations, "action": torch.nn.functional.one_hot(flat.actions, 2),
         "steps_to_next_obs": flat.steps[:, None],
         "next": {"observation": flat.next_observations, "reward": flat.rewards[:, None],
                  "done": flat.terminated[:, None], "terminated": flat.terminated[:, None]}}, [200],
    )  # fmt: skip
    wanted = theirs(data)["loss"]
    got = td_loss(gather_actions(one.q(batch.observations), batch.actions), one.targets(batch))
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    wanted.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    mine = torch.autograd.grad(got, list(one.q.parameters()))
    assert len(gradients) == len(mine)
    for (key, _), g in zip(one.q.named_parameters(), mine, strict=True):
        (match,) = (x for n, x in gradients.items() if n.endswith(key))
        assert torch.allclose(g, match, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize(("name", "theirs"), [("dqn", "DQN"), ("double", "DoubleDQN")])
def test_losses_of_dqn_are_d3rlpys(name, theirs):
    d3rlpy = pytest.importorskip("d3rlpy")
    from d3rlpy.torch_utility import TorchMiniBatch

    one, batch = made(name, hidden=16)
    encoder = d3rlpy.models.VectorEncoderFactory([16, 16])
    learner = getattr(d3rlpy.algos, f"{theirs}Config")(encoder_factory=encoder, gamma=0.9).create(device="cpu:0")
    learner.create_impl((4,), 2)
    impl = learner.impl
    size = torch.tensor(dqn.OBS_SCALE)
    for q, network in ((one.q, impl._modules.q_funcs[0]), (one.target, impl._modules.targ_q_funcs[0])):
        layers = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
        for i, (layer, weight, bias) in enumerate(zip(layers, q.weights, q.biases, strict=True)):
            layer.weight.data = (weight[0] / (1 if i else size[:, None])).detach().T.contiguous()
            layer.bias.data = bias[0, 0].detach().clone()
    flat = Transitions(*(column[0] for column in batch.columns()))
    given = TorchMiniBatch(
        flat.observations, flat.actions[:, None], flat.rewards[:, None], flat.next_observations, flat.actions[:, None],
        torch.zeros(200, 1), flat.terminated.float()[:, None], torch.ones(200, 1), "cpu:0",
    )  # fmt: skip
    wanted = impl.compute_loss(given, impl.compute_target(given)).loss
    got = td_loss(gather_actions(one.q(batch.observations), batch.actions), one.targets(batch))
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_weights_of_priorities_count_in_the_loss():
    q, wanted, weights = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.5, 0.0]]), torch.tensor([[1.0, 0.25]])
    assert td_loss(q, wanted, weights).item() == pytest.approx((0.125 + 0.25 * 2.5) / 2)
    assert td_loss(q, wanted).item() == pytest.approx((0.125 + 2.5) / 2)


@pytest.mark.parametrize("name", list(dqn.VARIANTS))
def test_a_learner_learns_by_its_own_steps_only(name):
    """Learner 0 next to another whose steps are changed, to the last bit; and each action is its own network's."""
    after = []
    for change in (0.0, 1.0):
        one, batch = made(name, count=2, capacity=500)
        columns = [column.transpose(0, 1).clone() for column in batch.columns()]  # (200, 2, …)
        columns[0][:, 1] += change
        rows = one.replay.add(Transitions(*columns))
        if one.priorities is not None:
            one.priorities.add(rows)
        rng = torch.Generator().manual_seed(2)
        for _ in range(30):
            one.update(one.sample(rng), rng)
        after.append([p.detach().clone() for p in one.q.parameters()])
        assert any(not torch.equal(a, b) for a, b in zip(one.q.parameters(), one.target.parameters(), strict=True))
    for a, b in zip(*after, strict=True):
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[1], b[1])
    seen = torch.randn(6, 4)
    for i, action in enumerate(one.greedy(seen)):
        assert action == one.q(seen[i].expand(2, 1, 4))[i % 2, 0].argmax()


@pytest.mark.long
@pytest.mark.parametrize("seed", [21, 22, 23])
def test_with_all_four_the_worst_of_three_learners_balances_the_pole(tmp_path, seed):
    """The default of a run, without the other experiments."""
    cfg = main.Config(seed=seed, threads=1, experiment="dqn", variants="n_step,all", checkpoint_every=40)
    checks = execute(INFO, cfg, tmp_path / "run")["checks"]
    assert checks["cartpole_all_worst"]["value"] >= 400
    assert checks["cartpole_n_step"]["value"] >= 250


class Scaled(VectorEnv):
    """CartPole whose rewards are multiplied."""

    factor = 1.0

    def collect(self, act, steps):
        rollout = super().collect(act, steps)
        rollout.rewards = self.factor * rollout.rewards
        return rollout


def trained(name, factor, steps, count=1):
    torch.manual_seed(0)
    envs = Scaled(environments.make("CartPole-v1", 4 * count), 0)
    envs.factor = factor
    one = dqn.DQN(dqn.VARIANTS[name], envs, count, dqn.Settings(every=4))
    for part in range(8):
        one.train(steps // 8, part / 8, (part + 1) / 8, 1.0, torch.Generator().manual_seed(part))
    return one


@pytest.mark.parametrize("name", list(dqn.VARIANTS))
def test_the_unit_of_rewards_changes_no_bit(name):
    plain, *others = (trained(name, factor, 1600) for factor in (1.0, 100.0, 0.01))
    assert plain.updates > 100
    for other in others:
        for a, b in zip(plain.q.parameters(), other.q.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_larger_reward_rescales_what_is_in_the_replay_buffer():
    """Rewards count as shares of the largest so far, old ones too."""
    envs = VectorEnv(environments.make("CartPole-v1", 2), 0)
    one = dqn.DQN(dqn.VARIANTS["dqn"], envs, 2, dqn.Settings())
    for scale in (1.0, 4.0):
        rollout = envs.collect(lambda x: torch.zeros(len(x), dtype=torch.int64), 3)
        rollout.rewards = scale * rollout.rewards
        one.remember(rollout)
    assert torch.allclose(one.replay.rows.rewards[:6].mean(1), torch.tensor([0.025] * 3 + [0.1] * 3))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_dqn_learns_in_any_unit_of_reward(factor):
    """A quarter of the way from random actions, 22, to the most, 500: the toy's target."""
    one = trained("all", factor, 16_000)
    envs = environments.make("CartPole-v1", 20)
    assert one.evaluate(envs, range(20)).item() >= 22 + 0.25 * (500 - 22)


@pytest.mark.parametrize("name", ["prioritized", "n_step"])
def test_what_a_checkpoint_holds_is_the_whole_state(name):
    """After two parts of a training, saved, and loaded into fresh learners: the next part is the same."""
    one, other = trained(name, 1.0, 1600), trained(name, 1.0, 0)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for learner in (one, other):
        learner.train(200, 0.5, 0.6, 1.0, torch.Generator().manual_seed(9))
    assert one.updates == other.updates > 100
    for a, b in zip(one.q.parameters(), other.q.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dueling", [False, True])
def test_q_networks_are_separate_and_the_mean_of_a_dueling_q_is_its_value(dueling):
    q, obs = dqn.QNetworks(3, 4, [8, 8], [1.0, 2.0], dueling), torch.randn(3, 5, 2)
    got = q(obs)
    assert got.shape == (3, 5, 4)
    for k in range(3):
        x = obs[k] / torch.tensor([1.0, 2.0])
        for i, (weight, bias) in enumerate(zip(q.weights, q.biases, strict=True)):
            x = (x.relu() if i else x) @ weight[k] + bias[k]
        if dueling:
            assert torch.allclose(got[k].mean(-1), x[:, 0], atol=1e-6)
            assert torch.allclose(got[k] - got[k][:, :1], x[:, 1:] - x[:, 1:2], atol=1e-6)
        else:
            assert torch.allclose(got[k], x, atol=1e-6)
    for gradient in torch.autograd.grad(got[1].sum(), list(q.parameters())):
        assert not gradient[[0, 2]].any()
        assert gradient[1].any()
