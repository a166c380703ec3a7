"""rl.envs.logged_data and rl.agents.offline: files, generated sets, cloning, fitted Q evaluation, reward mismatch."""

import numpy as np
import pytest
import torch

from finetune.errors import UserError
from finetune.rl.agents import offline
from finetune.rl.agents.networks import Deterministic, QNetwork, TwinQ
from finetune.rl.agents.targets import double_dqn_target, gather_actions
from finetune.rl.envs import controllers, environments, logged_data
from finetune.rl.envs.evaluation import true_returns
from finetune.rl.envs.replay import Transitions
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.sample import sample_tabular


def columns(**changes):
    """Two episodes of three and two steps, the first terminated, the second cut off."""
    seen = np.arange(10, dtype=np.float32).reshape(5, 2)
    found = {
        "observations": seen, "actions": np.array([0, 1, 1, 0, 1]), "rewards": np.array([1.0, 2, 4, 8, 16]),
        "terminations": np.array([0, 0, 1, 0, 0], bool), "truncations": np.array([0, 0, 0, 0, 1], bool),
        "next_observations": seen + 2,
    }  # fmt: skip
    return {name: value for name, value in (found | changes).items() if value is not None}


def written(folder, **changes):
    np.savez(folder / "set.npz", **columns(**changes))
    return folder / "set.npz"


# --- Files


def test_a_set_is_what_was_saved(tmp_path):
    for env, quality in (("CartPole-v1", "medium"), ("Pendulum-v1", "mixed")):
        made = logged_data.generate(env, quality, 300, 0)
        made.save(tmp_path / f"{quality}.npz")
        read = logged_data.load(tmp_path / f"{quality}.npz")
        for name in (*logged_data.FIELDS, "next_observations"):
            assert torch.equal(getattr(made, name), getattr(read, name))
            assert getattr(made, name).dtype == getattr(read, name).dtype
        assert read.name == quality


def test_minaris_form_with_one_more_observation_an_episode_is_the_same(tmp_path):
    seen = columns()["observations"]
    more = np.concatenate([seen[:3], seen[2:3] + 2, seen[3:], seen[4:] + 2])
    read = logged_data.load(written(tmp_path, observations=more, next_observations=None))
    assert read.observations.tolist() == seen.tolist()
    assert read.next_observations.tolist() == (seen + 2).tolist()


def test_returns_end_with_their_episodes(tmp_path):
    whole = logged_data.load(written(tmp_path))
    assert whole.returns() == [7.0, 24.0]
    assert whole.returns_to_go(0.5).tolist() == [3.0, 4.0, 4.0, 16.0, 16.0]
    unfinished = logged_data.load(written(tmp_path, truncations=np.zeros(5, bool)))
    assert unfinished.returns() == [7.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None, "actions": None}, "has no actions, rewards: it needs observations, actions"),
        ({"rewards": np.array([1, 2, np.nan, 4, 5])}, r"rewards\[2\] is nan: every number must be finite"),
        ({"rewards": np.zeros((5, 2))}, r"rewards has shape \(5, 2\): it must have 1 dimensions"),
        ({"rewards": np.zeros(0)}, "rewards is empty"),
        ({"rewards": np.array(list("abcde"))}, "rewards is <U1: it must hold numbers"),
        ({"actions": np.zeros(4, int)}, "actions has 4 rows, rewards has 5"),
        ({"actions": np.zeros(5)}, r"actions is float64: it must hold integers, or floats in rows \(N, A\)"),
        ({"actions": np.zeros((5, 2, 1), int)}, r"actions has shape \(5, 2, 1\): \(N,\), \(N, 1\) or \(N, A\) is read"),
        (
            {"actions": np.array([0, 1, 2**63, 0, 0], np.uint64)},
            r"actions\[2\] is 9223372036854775808: more actions than any environment has",
        ),
        ({"rewards": np.array([1, 2, 1e39, 4, 5])}, r"rewards\[2\] is 1e\+39: every number must be finite, in float32"),
        ({"observations": np.full((5, 2), -2e28, np.float32)}, r"observations\[0\] has a number beyond ±1e\+15"),
        ({"actions": np.full((5, 1), np.inf)}, r"actions\[0\] is \[inf\]"),
        ({"terminations": np.array([0, 0, 2, 0, 0])}, r"terminations\[2\] is 2: it must be 0 or 1"),
        ({"truncations": np.array([0, 0.5, 0, 0, 1])}, r"truncations\[1\] is 0.5: it must be 0 or 1"),
        ({"truncations": np.array(list("abcde"))}, "truncations is <U1: it must hold booleans"),
        ({"observations": np.zeros(5)}, r"observations has shape \(5,\): it must have 2 dimensions"),
        ({"next_observations": np.zeros((5, 3))}, r"observations are \(5, 2\), next_observations \(5, 3\)"),
        (
            {"next_observations": None, "observations": np.zeros((6, 2))},
            "observations has 6 rows: without next_observations it must have 5, one a step, or 7",
        ),
        ({"observations": np.array([[{}]] * 5)}, "is not an npz of plain arrays"),
    ],
)
def test_bad_files_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=f"set.npz.*{message}"):
        logged_data.load(written(tmp_path, **changes))


def test_what_is_no_npz_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("observations")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name, message in (
        ("none.npz", "there is no such file"),
        ("text.npz", "no npz|not an npz"),
        ("one.npy", "one array"),
    ):
        with pytest.raises(UserError, match=message):
            logged_data.load(tmp_path / name)


def test_a_set_of_another_environment_is_refused(tmp_path):
    cartpole, pendulum = (environments.make(name, 1)[0] for name in ("CartPole-v1", "Pendulum-v1"))
    logged_data.generate("CartPole-v1", "random", 20, 0).fit(cartpole)
    logged_data.generate("Pendulum-v1", "random", 20, 0).fit(pendulum)
    four, three = np.zeros((5, 4)), np.zeros((5, 3))
    for env, changes, message in (
        (cartpole, {}, "set: observations have 2 numbers, CartPole-v1's 4"),
        (
            cartpole,
            {"observations": four, "next_observations": four, "actions": np.full(5, 2)},
            r"actions\[0\] is 2",
        ),
        (cartpole, {"actions": np.zeros((5, 1))}, "set: actions are continuous, those of CartPole-v1 discrete"),
        (pendulum, {"observations": three, "next_observations": three, "actions": np.full((5, 1), 3.0)}, "beyond"),
        (pendulum, {"observations": three, "next_observations": three, "actions": np.zeros((5, 2))}, "have 2 numbers"),
    ):
        with pytest.raises(UserError, match=message):
            logged_data.load(written(tmp_path, **changes)).fit(env)


# --- Sets of stated quality


def test_sets_are_of_their_quality_and_depend_on_the_seed():
    def mean(env, quality, steps):
        return np.mean(logged_data.generate(env, quality, steps, 5).returns())

    assert mean("CartPole-v1", "expert", 2000) == 500
    assert 15 < mean("CartPole-v1", "random", 3000) < 30
    assert 10 < mean("CartPole-v1", "mixed", 3000) < 22
    assert 60 < mean("CartPole-v1", "medium", 5000) < 300
    assert mean("Pendulum-v1", "random", 2000) < -900
    assert mean("Pendulum-v1", "mixed", 4000) < -400
    assert mean("Pendulum-v1", "expert", 2000) > -250
    wrong = logged_data.generate("CartPole-v1", "mixed", 5000, 5)
    right = np.array([controllers.balance(seen.numpy()) for seen in wrong.observations])
    assert 0.58 < np.mean(wrong.actions.numpy() != right) < 0.62
    one, same, other = (logged_data.generate("CartPole-v1", "random", 50, seed) for seed in (1, 1, 2))
    assert torch.equal(one.observations, same.observations)
    assert not torch.equal(one.observations[:20], other.observations[:20])
    for given, message in ((("CartPole-v2", "random"), "no sets"), (("CartPole-v1", "exprt"), "did you mean 'expert'")):
        with pytest.raises(UserError, match=message):
            logged_data.generate(*given, 10, 0)


def test_episodes_of_a_set_are_whole():
    made = logged_data.generate("CartPole-v1", "random", 200, 0)
    ends = made.terminations | made.truncations
    assert ends[-1]
    goes_on = ~ends[:-1]
    assert torch.equal(made.observations[1:][goes_on], made.next_observations[:-1][goes_on])
    assert sum(made.returns()) == len(made) >= 200


# --- Targets, evaluation


def test_the_double_dqn_target_takes_its_action_from_one_network_and_its_value_from_the_other():
    online, target = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    found = double_dqn_target(online, target, torch.ones(2), torch.tensor([False, True]), 0.5)
    assert found.tolist() == [11.0, 1.0]


def one_hot(states):
    return torch.eye(6)[states]


def test_fqe_finds_the_exact_values_of_another_policy():
    """A tabular Q-network (no hidden layer, one-hot states), stochastic policy; behavior is uniform."""
    draw = np.random.default_rng(0)
    mdp = tables.garnet(5, 2, 2, draw, 0.8, ending=0.2)
    policy = draw.dirichlet(np.ones(2), 6)
    r = sample_tabular(mdp, tables.uniform(mdp), 400, np.zeros(100, np.intp), draw)
    s, a, after, rewards, over = (
        x.flatten() for x in (r.observations, r.actions, r.next_observations, r.rewards, r.terminated)
    )
    data = Transitions(one_hot(s), a, rewards.float(), one_hot(after), over)
    chances = torch.from_numpy(policy).float()
    torch.manual_seed(0)
    fqe = offline.FQE(QNetwork(6, 2, []), data, chances[after], gamma=0.8, lr=0.05, tau=0.1)
    rows = torch.Generator().manual_seed(0)
    for step in range(300):
        fqe.optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        fqe.update(torch.randint(len(data), (256,), generator=rows))
    exact = tables.solve(mdp, policy)
    found = fqe.value(torch.eye(6), chances).numpy()
    scale = np.abs(exact).max()
    assert np.abs(found - exact)[:5].max() < 0.05 * scale
    wrong = tables.solve(mdp, tables.uniform(mdp))
    assert np.abs(wrong - exact)[:5].max() > 0.1 * scale, "the behavior's own values would pass"


def test_fqe_of_continuous_actions_takes_the_policys_action():
    torch.manual_seed(0)
    q, data = TwinQ(3, 1, [8], 1), logged_data.generate("Pendulum-v1", "random", 200, 0).transitions()
    fqe = offline.FQE(q, data, torch.zeros(len(data), 1), gamma=0.9, lr=0.0, tau=0.5)
    rows = torch.arange(7)
    batch = data[rows]
    wanted = batch.rewards + 0.9 * q(batch.next_observations, torch.zeros(7, 1))[0]
    loss = (q(batch.observations, batch.actions)[0] - wanted).square().mean()
    assert fqe.update(rows) == pytest.approx(loss.item(), rel=1e-5)


def test_fqe_keeps_within_what_rewards_allow():
    assert offline.return_bounds(torch.tensor([1.0, 1.0]), 0.9) == pytest.approx((0, 10))
    assert offline.return_bounds(torch.tensor([-16.0, -1.0]), 0.75) == pytest.approx((-64, 0))
    q = QNetwork(1, 2, [])
    data = Transitions(torch.ones(4, 1), torch.zeros(4).long(), torch.ones(4), torch.ones(4, 1), torch.zeros(4).bool())
    with torch.no_grad():
        q.net[0].weight.zero_()
        q.net[0].bias.fill_(100.0)
    fqe = offline.FQE(q, data, torch.full((4, 2), 0.5), gamma=0.9, lr=0.0, tau=0.0, limits=(0.0, 10.0))
    assert fqe.update(torch.arange(4)) == pytest.approx((100 - 1 - 0.9 * 10) ** 2)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_rewards_of_logs_that_are_not_the_environments_are_noticed(env):
    envs = environments.make(env, 5)
    for quality in ("expert", "medium", "random"):
        data = logged_data.generate(env, quality, 2000, 0).transitions()
        assert offline.reward_mismatch(data, envs, range(5)) is None, quality
        for changed in (100 * data.rewards, 0.1 * data.rewards, data.rewards + 3.0, -data.rewards):
            other = Transitions(data.observations, data.actions, changed, data.next_observations, data.terminated)
            came, logged = offline.reward_mismatch(other, envs, range(5))
            assert abs(came - logged) > 0.1 * abs(came), quality
    if env == "CartPole-v1":  # only the end is paid otherwise
        ends = torch.where(data.terminated, -10.0, data.rewards)
        other = Transitions(data.observations, data.actions, ends, data.next_observations, data.terminated)
        assert offline.reward_mismatch(other, envs, range(5)) is not None


def test_a_loss_that_is_not_finite_is_no_result():
    data = logged_data.generate("CartPole-v1", "random", 50, 0).transitions()
    data.rewards = data.rewards * 1e30
    fqe = offline.FQE(QNetwork(4, 2, []), data, torch.full((len(data), 2), 0.5), gamma=0.9, lr=0.0, tau=0.0)
    with pytest.raises(UserError, match="the loss of fitted Q evaluation became inf"):
        fqe.update(torch.arange(4))


def test_cloning_samples_discrete_actions_as_often_as_the_behavior_policy_took_them():
    torch.manual_seed(0)
    cloning, g = offline.Cloning(QNetwork(4, 2, [16]), 1e-2), torch.Generator().manual_seed(1)
    seen, actions = torch.randn(4000, 4, generator=g), (torch.rand(4000, generator=g) < 0.7).long()
    batch = Transitions(seen, actions, torch.zeros(4000), seen, torch.zeros(4000).bool())
    for _ in range(200):
        cloning.update(batch)
    sampled = cloning.act(seen, torch.Generator().manual_seed(0))
    assert sampled.float().mean().item() == pytest.approx(0.7, abs=0.05)
    assert torch.allclose(cloning.policy(seen).sum(1), torch.ones(4000))
    assert cloning.value(seen, actions) is None


def test_cloning_of_continuous_actions_finds_them():
    torch.manual_seed(0)
    low, high = torch.full((1,), -1.0), torch.full((1,), 1.0)
    cloning, seen = offline.Cloning(Deterministic(2, [16], low, high), 1e-2), torch.randn(256, 2)
    actions = seen[:, :1].tanh() / 2
    batch = Transitions(seen, actions, torch.zeros(256), seen, torch.zeros(256).bool())
    for _ in range(300):
        cloning.update(batch)
    acts = cloning.act(seen, torch.Generator())
    assert (acts - actions).abs().mean() < 0.02
    assert torch.equal(acts, cloning.policy(seen))


def test_cloning_loss_and_scores():
    logits, actions = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([1, 0])
    wanted = -gather_actions(logits.log_softmax(-1), actions).mean()
    assert torch.equal(offline.cloning_loss(logits, actions), wanted)
    assert offline.cloning_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [0.0]])) == 4.5
    assert [offline.normalized_score(x, 20.0, 500.0) for x in (20.0, 500.0, 260.0)] == [0, 100, 50]


def test_true_returns_are_discounted_and_end_with_the_episode():
    envs = environments.make("CartPole-v1", 2)
    rollout, returns = true_returns(envs, lambda seen: torch.zeros(len(seen), dtype=torch.long), [3, 4], 0.9)
    for i in range(2):
        length = int(rollout.first_episode[:, i].sum())
        assert returns[0, i] == pytest.approx((1 - 0.9**length) / 0.1, rel=1e-5)
        assert returns[length - 1, i] == 1
        assert not returns[length:, i].any()
