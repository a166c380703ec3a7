"""Deep RL from pixels, played and logged: every algorithm with convolutions learns, the others refuse images."""

import dataclasses

import gymnasium
import numpy as np
import pytest
import torch
from seeds import THREE
from small_games import Catch
from summaries import numbers

from finetune.errors import UserError
from finetune.rl.agents.networks import QNetwork
from finetune.rl.agents.offline import reward_mismatch
from finetune.rl.envs import environments, logged_data
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.vector import VectorEnv
from finetune.runs import registry
from finetune.runs.run import execute

actor_critic = registry.load(registry.find("actor_critic"))
registry.load(registry.find("td_learning"))
dqn = registry.part("td_learning", "dqn")
cql, bcq = (registry.load(registry.find(name)) for name in ("cql", "bcq"))
cql_discrete, bcq_discrete = registry.part("cql", "cql_discrete"), registry.part("bcq", "bcq_discrete")
NAME = "finetune/Catch-v0"


@pytest.fixture(autouse=True)
def catch():
    gymnasium.register(NAME, Catch)
    yield
    del gymnasium.registry[NAME]


def mean_return(policy, count=50):
    return sum(returns(environments.make(NAME, count), policy, range(count))) / count


@pytest.mark.parametrize("seed", THREE)
def test_a2c_learns_from_pixels(seed):
    """Random actions get 1.0 ± 0.1, the best ones 5.9; six seeds gave 3.6 to 5.8."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    agent = actor_critic.A2C(actor_critic.Config.toy(), VectorEnv(environments.make(NAME, 8), seed))
    assert mean_return(lambda obs: agent.act(obs, rng)) < 1.8
    agent.train_for(16_000, 1.0, rng)
    assert mean_return(agent.greedy) > 2.5


def test_dqn_learns_from_pixels():
    """Three learners in lockstep, each with convolutions of its own."""
    torch.manual_seed(0)
    settings = dqn.Settings(every=4, warmup=300, batch=64)
    learner = dqn.DQN(dqn.VARIANTS["double"], VectorEnv(environments.make(NAME, 12), 0), 3, settings)
    test = environments.make(NAME, 90)
    learner.train(2000, 0.0, 1.0, 1.0, torch.Generator().manual_seed(0))
    found = learner.evaluate(test, range(90))
    assert found.mean() > 2
    assert found.min() > 1.2


SMALL = {
    "actor_critic": {"env": NAME, "methods": "one_step,a2c,vtrace", "repeats": 1, "critic_steps": 1, "freeze_after": 1,
                     "critic_states": 4, "critic_episodes": 2, "eval_episodes": 2},
    "policy_gradient": {"env": NAME, "methods": "reinforce,natural,trpo", "episodes": 4, "eval_episodes": 2,
                        "corridor_steps": 0, "score_episodes": 1000, "variance_groups": 10},
    "gae": {"ppo_env": NAME, "ppo_updates": 2, "ppo_lams": "0.95", "samples": 2, "bench_steps": 8, "bench_rows": 2,
            "ppo_horizon": 16},
    "td_learning": {"env": NAME, "dqn_steps": 1200, "variants": "all", "dqn_runs": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_run_says_what_its_images_are(name, tmp_path, no_pictures, capsys):
    info = registry.find(name)
    cfg = dataclasses.replace(registry.load(info).Config.toy(), steps=2, checkpoint_every=1, **SMALL[name])
    whole = execute(info, cfg, tmp_path / "run", toy=True)
    assert capsys.readouterr().out.count(f"'{NAME}': images of 8 × 8 (3 channels, the last axis)") == 1
    results = {key: value for key, value in whole["metrics"].items() if "return" in key}
    assert results
    assert all(0 <= value <= 6 for value in results.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "a2c,lambda"}, "lambda learns from vectors: omit it from --methods; a2c has convolutions"),
        ({"methods": "sac", "continuous_env": "finetune/Steered-v0"}, "sac, td3 learns from vectors"),
    ],
)
def test_methods_without_convolutions_refuse_images(options, message, tmp_path):
    class Steered(Catch):
        def __init__(self):
            super().__init__()
            self.action_space = gymnasium.spaces.Box(0, 2, (1,))

        def step(self, action):
            return super().step(round(float(action[0])))

    gymnasium.register("finetune/Steered-v0", Steered)
    info = registry.find("actor_critic")
    cfg = dataclasses.replace(actor_critic.Config.toy(), **({"env": NAME} | options))
    with pytest.raises(UserError, match=message):
        execute(info, cfg, tmp_path / "run", toy=True)
    del gymnasium.registry["finetune/Steered-v0"]


# --- From logs


def log_of_catch(path, seed, episodes=400, skill=0.4, layout="last"):
    """A log of random actions, of which a share of `skill` goes toward the pixel; its mean return."""
    game, rng, rows = Catch(layout), np.random.default_rng(seed), []
    for i in range(episodes):
        seen, over = game.reset(seed=1000 * seed + i)[0], False
        while not over:
            toward = 1 + np.sign(game.column - game.paddle)
            action = int(toward if rng.random() < skill else rng.integers(3))
            after, reward, over, cut, _ = game.step(action)
            rows.append((seen, action, reward, after, over, cut))
            seen = after
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    np.savez(path, **{name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})
    return sum(row[2] for row in rows) / episodes


def offline_learner(name, image, seed):
    torch.manual_seed(seed)
    if name == "cql":
        return cql_discrete.CQL(QNetwork(image, 3, [64, 64]), alpha=0.3, gamma=0.8, lr=2e-3, tau=0.05)
    config = dataclasses.replace(bcq.Config.toy(), lr=2e-3, gamma=0.8)
    return bcq_discrete.BCQ(config, bcq_discrete.QAndImitator(image, 3, 64, shared=True), 0.3)


@pytest.mark.parametrize("seed", THREE)
@pytest.mark.parametrize("name", ["cql", "bcq"])
def test_offline_methods_learn_more_than_their_log_from_pixels(name, seed, tmp_path):
    """The log gets 2.6 ± 0.1, the best actions 5.9; six runs gave 4.8 to 5.8."""
    behavior = log_of_catch(tmp_path / "log.npz", seed)
    steps = logged_data.load(tmp_path / "log.npz").fit(environments.make(NAME, 1)[0]).transitions()
    assert steps.observations.dtype == torch.uint8
    learner, rng = (
        offline_learner(name, environments.make(NAME, 1)[0].observed, seed),
        torch.Generator().manual_seed(seed),
    )
    for _ in range(1000):
        learner.update(steps.sample(32, rng), rng)
    assert mean_return(learner.act) > behavior + 1.5


OFFLINE = {
    "cql": {"steps": 2, "updates": 100, "batch": 32, "fqe_steps": 3, "eval_every": 1, "eval_episodes": 8, "gamma": 0.8},
    "bcq": {"steps": 200, "fqe_steps": 200, "fqe_batch": 32, "eval_every": 100, "eval_episodes": 8, "gamma": 0.8},
}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", OFFLINE)
def test_a_run_learns_from_logged_images(name, alone, tmp_path, monkeypatch, capsys):
    log_of_catch(tmp_path / "log.npz", 0, episodes=150)
    seen, update = set(), QNetwork.forward
    monkeypatch.setattr(QNetwork, "forward", lambda self, x: seen.add(x.dtype) or update(self, x))
    where = {"env" if name == "cql" else "envs": "none" if alone else NAME}
    config = dataclasses.replace(
        {"cql": cql, "bcq": bcq}[name].Config.toy(), data=tmp_path / "log.npz", lr=2e-3, **where, **OFFLINE[name]
    )
    summary = execute(registry.find(name), config, tmp_path / "run", toy=True)
    assert "images of 8 × 8 (3 channels, the last axis)" in capsys.readouterr().out
    found = numbers(summary)
    assert all(np.isfinite(value) for value in found.values())
    assert seen == {torch.uint8}, "bytes stay bytes up to the network"
    if alone:
        key = {"cql": "fqe_data_{}", "bcq": "fqe_{}_log_log"}[name]
        observed = summary["baseline"][key.format(name)]
        assert found[key.format("behavior")] == pytest.approx(observed, rel=0.3)


def test_rewards_of_logged_images_are_compared_with_the_environments(tmp_path):
    log_of_catch(tmp_path / "log.npz", 0)
    envs = environments.make(NAME, 20)
    data = logged_data.load(tmp_path / "log.npz").fit(envs[0])
    assert reward_mismatch(data.transitions(), envs, range(20)) is None
    data.rewards *= 3
    assert reward_mismatch(data.transitions(), envs, range(20)) is not None


def test_logged_images_that_do_not_fit_are_refused(tmp_path):
    for layout in ("last", "first", "floats"):
        log_of_catch(tmp_path / f"{layout}.npz", 0, 2, layout=layout)
    arrays = dict(np.load(tmp_path / "last.npz"))
    np.savez(tmp_path / "torques.npz", **arrays | {"actions": np.ones((14, 1))})
    flat = {key: arrays[key].reshape(14, -1) for key in ("observations", "next_observations")}
    np.savez(tmp_path / "flat.npz", **arrays | flat)
    np.savez(tmp_path / "large.npz", **arrays | {key: arrays[key].astype(np.float32) for key in flat})
    env = environments.make(NAME, 1)[0]
    for name, message in (
        ("first", r"first: observations have the axes \(3, 8, 8\), finetune/Catch-v0's \(8, 8, 3\)"),
        ("floats", "observations have 128 numbers, finetune/Catch-v0's 192"),
        ("flat", r"flat: observations have the axes \(192,\), finetune/Catch-v0's \(8, 8, 3\)"),
        ("large", "observations are numbers other than uint8, those of finetune/Catch-v0 pixels of uint8"),
        ("torques", "actions are continuous, those of finetune/Catch-v0 discrete"),
    ):
        with pytest.raises(UserError, match=message):
            logged_data.load(tmp_path / f"{name}.npz").fit(env)
    with pytest.raises(
        UserError, match=r"observations are images of 8 × 8 .* of continuous actions learns from vectors"
    ):
        logged_data.load(tmp_path / "torques.npz").alone()
    env.continuous = True
    with pytest.raises(
        UserError, match=r"has images of 8 × 8 .*, and offline RL of continuous actions learns from vec"
    ):
        logged_data.load(tmp_path / "torques.npz").fit(env)
    env.continuous, env.observed = False, 192
    with pytest.raises(UserError, match=r"are images of 8 × 8 .*, those of finetune/Catch-v0 are vectors"):
        logged_data.load(tmp_path / "last.npz").fit(env)
    floats = environments.Env(Catch("floats"), "Floats", 7, environments.EpisodeLimit())
    assert logged_data.load(tmp_path / "floats.npz").fit(floats).observations.shape == (14, 128)
