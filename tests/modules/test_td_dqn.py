"""DQN of the td_learning module: losses equal to torchrl's and d3rlpy's, learners that do not mix, what is learned."""

import copy
import importlib

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
dqn = importlib.import_module("finetune_modules.td_learning.dqn")


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
    size = torch.tensor(dqn.SIZE)
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
    """Learner 0 beside another whose steps are changed, to the last bit; and each action is its own network's."""
    after = []
    for change in (0.0, 1.0):
        one, batch = made(name, count=2, capacity=500)
        columns = [column.transpose(0, 1).clone() for column in batch.columns()]  # (200, 2, …)
        columns[0][:, 1] += change
        rows = one.replay.add(Transitions(*columns))
        if one.priorities is not None:
            one.priorities.add(rows)
        draw = torch.Generator().manual_seed(2)
        for _ in range(30):
            one.update(0.5, draw)
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
def test_with_all_four_the_worst_of_three_learners_balances_the_pole(tmp_path, seed, monkeypatch):
    """The default of a run, without the other experiments."""
    monkeypatch.setattr(main, "experiment", lambda *_: None)
    monkeypatch.setattr(main, "in_short", lambda *_: {})
    monkeypatch.setattr(main, "JUDGES", {})
    monkeypatch.setattr(main, "compare", lambda *_: None)
    monkeypatch.setattr(main.plots, "draw", lambda *_: None)
    cfg = main.Config(seed=seed, threads=1, taxi_steps=1, variants="n_step,all", checkpoint_every=40)
    metrics = execute(INFO, cfg, tmp_path / "run")["metrics"]
    assert metrics["cartpole_worst"] >= 400
    assert metrics["cartpole_n_step"] >= 250
