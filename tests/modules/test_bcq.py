"""The bcq module: losses and targets against d3rlpy, both ends of the filter's threshold, runs."""

import copy
import dataclasses
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
from known_tasks import GAMMA, check_learned_alone, continuous_log, continuous_value, tabular_log, world
from learner_state import continues_from_its_state
from seeds import THREE
from summaries import numbers

from finetune.errors import UserError
from finetune.rl.agents.offline import Cloning
from finetune.rl.envs import logged_data
from finetune.rl.envs.replay import Transitions
from finetune.rl.tabular import mdp as tables
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("bcq")
bcq = registry.load(INFO)
discrete, continuous, td3_bc, iql, awac, data = (
    registry.part("bcq", name) for name in ("bcq_discrete", "bcq_continuous", "td3_bc", "iql", "awac", "data")
)


def toy(**changes):
    return dataclasses.replace(bcq.Config.toy(), threads=1, **changes)


# --- The filter and its ends


def test_the_filter_keeps_what_is_likely_enough():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]).log()
    assert discrete.allowed(logits, 0.5).tolist() == [[True, True, False], [False, False, True]]
    q = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 9.0, -5.0]])
    for tau, best in ((0.0, [2, 1]), (0.3, [2, 1]), (0.5, [1, 2]), (1.0, [0, 2])):
        assert discrete.filtered(q, logits, tau).argmax(-1).tolist() == best


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_either_end_of_the_threshold_is_dqn_or_cloning_to_the_last_bit(tau):
    """Networks apart: after training from the same weights on the same batches, weights, actions and targets."""
    torch.manual_seed(0)
    cfg, g = bcq.Config(hidden=16, target_every=7), torch.Generator().manual_seed(0)
    rows = Transitions(torch.randn(500, 4), torch.randint(3, (500,)), torch.randn(500), torch.randn(500, 4),
                       torch.rand(500) < 0.1)  # fmt: skip
    networks = discrete.QAndImitator(4, 3, 16, shared=False)
    if tau:
        other = Cloning(copy.deepcopy(networks.imitator), cfg.lr, cfg.beta)
        ours, theirs = networks.imitator, other.network
    else:
        other = discrete.DQN(cfg, copy.deepcopy(networks.q))
        ours, theirs = networks.q, other.q
    learner = discrete.BCQ(cfg, networks, tau)
    for _ in range(25):
        batch = rows.sample(32, g)
        losses = learner.update(batch), other.update(batch)
        assert set(losses[1]) < set(losses[0])
        assert all(torch.equal(losses[0][name], value) for name, value in losses[1].items())
    greedy = theirs(rows.observations).argmax(-1)
    assert torch.equal(learner.act(rows.observations), greedy)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert not torch.equal(discrete.BCQ(cfg, networks, 1 - tau).act(rows.observations), greedy)


def test_a_penalty_of_a_half_would_let_both_of_two_actions_through():
    """d3rlpy's β, on data of one action only: the ratio at the optimum is above its τ of 0.3. At our β it is not."""
    for beta, passes in ((0.5, True), (bcq.Config.beta, False)):
        logits = torch.zeros(1, 2, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=200)

        def closure(logits=logits, optimizer=optimizer, beta=beta):
            optimizer.zero_grad()
            loss = discrete.imitation_loss(logits, torch.tensor([0]), beta)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert bool(discrete.allowed(logits.detach(), 0.3)[0, 1]) == passes


# --- Continuous, in closed form


def test_the_soft_minimum_and_the_best_candidate():
    values = torch.tensor([[[1.0, 5.0, 2.0]], [[3.0, 1.0, 2.0]]])  # (2, 1, 3)
    assert continuous.soft_minimum(values, 0.75).tolist() == [[1.5, 2.0, 2.0]]
    assert [continuous.best_candidate(values, lam).item() for lam in (0.0, 0.75, 1.0)] == [5.0, 2.0, 2.0]


def test_an_expectile_of_zeros_and_ones_is_itself():
    draws = torch.tensor([0.0, 1.0], dtype=torch.float64)
    at = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(iql.expectile_loss(draws - at, 0.7), at)
    assert abs(gradient.item()) < 1e-12


def test_weights_rise_with_the_advantage():
    advantages = torch.tensor([-1.0, 0.0, 2.0])
    assert iql.iql_weights(advantages, 3.0).tolist() == pytest.approx([math.exp(-3), 1.0, 100.0])
    weights = awac.awac_weights(advantages, 0.5)
    assert weights.mean().item() == pytest.approx(1.0)
    assert (weights[2] / weights[1]).log().item() == pytest.approx(4.0, rel=1e-5)


def test_candidates_stay_near_the_proposals_and_within_bounds():
    torch.manual_seed(0)
    cvae, perturbation = continuous.CVAE(3, 2, 16), continuous.Perturbation(3, 2, 16, phi=0.05)
    perturbation.net[-1].bias.data += 50.0  # as far as it goes
    seen, draws = torch.randn(40, 3), [torch.Generator().manual_seed(1) for _ in range(2)]
    proposed = cvae.propose(seen, 7, draws[0])
    moved = continuous.candidates(cvae, perturbation, seen, 7, draws[1])
    assert proposed.shape == moved.shape == (40, 7, 2)
    assert torch.allclose(moved, (proposed + 0.05).clamp(max=1.0))


# --- d3rlpy's, on the same batch


@pytest.fixture(scope="module")
def d3rlpy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("d3rlpy")


def batch_of(actions, observations=4, rows=64, seed=0):
    from d3rlpy.torch_utility import TorchMiniBatch

    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g)

    taken = torch.randint(actions, (rows, 1), generator=g) if actions > 0 else draw(rows, -actions).tanh()
    return TorchMiniBatch(
        observations=draw(rows, observations), actions=taken, rewards=draw(rows, 1), next_actions=taken,
        next_observations=draw(rows, observations), returns_to_go=draw(rows, 1), intervals=torch.ones(rows, 1),
        terminals=(torch.rand(rows, 1, generator=g) < 0.3).float(), device="cpu",
    )  # fmt: skip


def impl_of(config, actions):
    torch.manual_seed(1)
    algorithm = config.create()
    algorithm.create_impl((4,), abs(actions))
    for parameter in algorithm.impl.modules.__dict__.values():
        if isinstance(parameter, torch.nn.Module):
            for p in parameter.parameters():
                p.data += 0.05 * torch.randn_like(p)  # a target that is not the network itself
    return algorithm.impl


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_the_discrete_target_and_loss_are_d3rlpys(d3rlpy, tau):
    impl = impl_of(d3rlpy.algos.DiscreteBCQConfig(action_flexibility=tau, beta=0.5), 3)
    batch, modules = batch_of(3), impl.modules
    target = impl.compute_target(batch)[:, 0]
    theirs = impl.compute_loss(batch, target[:, None])
    logits = modules.imitator(batch.next_observations).logits
    q = modules.q_funcs[0](batch.next_observations).q_value
    best = discrete.filtered(q, logits, tau).argmax(-1)
    assert (best != q.argmax(-1)).any()
    mine = modules.targ_q_funcs[0](batch.next_observations).q_value.gather(1, best[:, None])[:, 0]
    assert torch.equal(mine, target)
    imitation = discrete.imitation_loss(modules.imitator(batch.observations).logits, batch.actions[:, 0], 0.5)
    assert torch.allclose(imitation, theirs.imitator_loss, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.peer
def test_the_error_of_the_vae_is_d3rlpys(d3rlpy):
    from d3rlpy.models.torch import compute_vae_error
    from torch.distributions import Normal

    torch.manual_seed(0)
    cvae, batch = continuous.CVAE(4, 2, 16), batch_of(-2)

    def encoder(seen, actions):
        mean, log_deviation = cvae.encode(seen, actions)
        return Normal(mean, log_deviation.exp())

    torch.manual_seed(3)
    theirs = compute_vae_error(encoder, cvae.decode, batch.observations, batch.actions, beta=0.5)
    torch.manual_seed(3)
    mean, log_deviation = cvae.encode(batch.observations, batch.actions)
    decoded = cvae.decode(batch.observations, torch.normal(mean, log_deviation.exp()))
    mine = continuous.vae_loss(batch.actions, decoded, mean, log_deviation, 0.5)
    assert torch.allclose(mine, theirs, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("lam", [0.0, 0.75, 1.0])
def test_the_continuous_target_is_d3rlpys(d3rlpy, lam):
    """Their networks, their noise; my candidates, perturbation and soft minimum."""
    impl = impl_of(d3rlpy.algos.BCQConfig(lam=lam, n_action_samples=7, action_flexibility=0.2), -2)
    batch, modules = batch_of(-2), impl.modules
    torch.manual_seed(3)
    theirs = impl.compute_target(batch)[:, 0]

    cvae, perturbation = continuous.CVAE(4, 2, 256), continuous.Perturbation(4, 2, 256, phi=0.2)
    for mine, peer in ((cvae.decoder, modules.vae_decoder), (perturbation.net, modules.targ_policy)):
        mine.load_state_dict(dict(zip(mine.state_dict(), peer.state_dict().values(), strict=True)))
    cvae.decode = lambda seen, z: cvae.decoder(torch.cat([seen, z], -1))  # theirs has no tanh by default

    def values(seen, actions):
        flat = impl._targ_q_func_forwarder.compute_expected_q(seen.reshape(-1, 4), actions.reshape(-1, 2), "none")
        return flat.view(2, *actions.shape[:-1])

    draw = torch.Generator().manual_seed(3)
    actions = continuous.candidates(cvae, perturbation, batch.next_observations, 7, draw)
    repeated = batch.next_observations[:, None].expand(-1, 7, -1)
    assert torch.allclose(continuous.best_candidate(values(repeated, actions), lam), theirs, atol=1e-6)


@pytest.mark.slow
@pytest.mark.peer
def test_the_losses_of_td3_bc_iql_and_awac_are_d3rlpys(d3rlpy):
    algorithms, batch = d3rlpy.algos, batch_of(-2)
    impl = impl_of(algorithms.TD3PlusBCConfig(alpha=2.5), -2)
    taken = impl.modules.policy(batch.observations)
    q = impl._q_func_forwarder.compute_expected_q(batch.observations, taken.squashed_mu, "none")[0, :, 0]
    theirs = impl.compute_actor_loss(batch, taken).actor_loss
    assert torch.allclose(td3_bc.td3_bc_loss(q, taken.squashed_mu, batch.actions, 2.5), theirs, rtol=1e-6)

    impl = impl_of(algorithms.IQLConfig(expectile=0.8, weight_temp=3.0, max_weight=0.4), -2)
    q = impl._targ_q_func_forwarder.compute_expected_q(batch.observations, batch.actions, "min")[:, 0]
    advantages = (q - impl.modules.value_func(batch.observations)[:, 0]).detach()
    theirs = impl.compute_value_loss(batch)
    assert torch.allclose(iql.expectile_loss(advantages, 0.8), theirs, rtol=1e-6)
    theirs = impl._compute_weight(batch)[:, 0]
    assert torch.allclose(iql.iql_weights(advantages, 3.0, 0.4), theirs, rtol=1e-6)
    assert 0 < (theirs == 0.4).sum() < len(theirs)

    impl = impl_of(algorithms.AWACConfig(lam=0.5, n_action_samples=1), -2)
    torch.manual_seed(4)
    theirs = impl._compute_weights(batch.observations, batch.actions)[:, 0]
    torch.manual_seed(4)
    from d3rlpy.models.torch import build_gaussian_distribution

    own = build_gaussian_distribution(impl.modules.policy(batch.observations)).sample_n(1)[:, 0]
    q, v = (impl._q_func_forwarder.compute_expected_q(batch.observations, a, "min")[:, 0] for a in (batch.actions, own))
    assert torch.allclose(awac.awac_weights((q - v).detach(), 0.5), theirs, rtol=1e-5)


# --- Runs


@pytest.mark.slow
@pytest.mark.parametrize("seed", THREE)
def test_the_toy_reaches_its_targets(seed, tmp_path):
    summary = execute(INFO, toy(seed=seed), tmp_path / "run", toy=True)
    assert summary["passed"], (summary["reached"], summary["checks"])
    assert len(summary["metrics"]) <= 6, "headline results"
    for name in ("returns", "values", "evaluations", "sweep", "candidates_pendulum_mixed"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 10_000


SMALL = {"rows": 300, "steps": 4, "eval_every": 4, "eval_episodes": 2, "fqe_steps": 2, "checkpoint_every": 2,
         "act_candidates": 5, "compared": "awac", "sweep": "0,1"}  # fmt: skip
CARTPOLE = SMALL | {"envs": "CartPole-v1", "sweep_sets": "none"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("factor", [100.0, pytest.param(0.01, marks=pytest.mark.long)])
def test_on_an_experts_steps_bcq_balances_and_dqn_falls_in_any_unit_of_rewards(factor, tmp_path):
    """The bars of the toy on `expert`, with the rewards of its steps × 100 and × 0.01."""
    made = logged_data.generate("CartPole-v1", "expert", 10_000, 0)
    dataclasses.replace(made, rewards=made.rewards * factor).save(tmp_path / "log.npz")
    config = toy(**CARTPOLE | {"steps": 2000, "eval_every": 2000, "eval_episodes": 5}, data=tmp_path / "log.npz")
    found = numbers(execute(INFO, config, tmp_path / "run", toy=True))
    assert found["return_dqn_cartpole_log"] <= 500 - 0.75 * 480
    assert found["return_bcq_cartpole_log"] >= 500 - 0.5 * 480


@pytest.mark.parametrize("name", ["bc", "dqn", "bcq"])
def test_a_discrete_learner_continues_from_its_state(name):
    g = torch.Generator().manual_seed(0)
    seen, after = (torch.randn(16, 4, generator=g) for _ in range(2))
    actions, rewards = torch.randint(3, (16,), generator=g), torch.randn(16, generator=g)
    batch = Transitions(seen, actions, rewards, after, torch.zeros(16).bool())

    def make():
        networks = discrete.QAndImitator(4, 3, 16, shared=name == "bcq")
        if name == "bcq":
            return discrete.BCQ(bcq.Config(target_every=5), networks, 0.3)
        return discrete.DQN(bcq.Config(target_every=5), networks.q) if name == "dqn" else Cloning(networks.q, 1e-3)

    continues_from_its_state(make, batch)


@pytest.mark.parametrize("name", ["bcq", *bcq.COMPARED])
def test_a_continuous_learner_continues_from_its_state(name):
    make, g = bcq.COMPARED.get(name, continuous.BCQ), torch.Generator().manual_seed(0)
    seen, after, actions = (torch.randn(16, n, generator=g) for n in (3, 3, 2))
    batch = Transitions(seen, actions.tanh(), torch.randn(16, generator=g), after, torch.zeros(16).bool())
    continues_from_its_state(lambda: make(toy(hidden=16, act_candidates=5), 3, 2), batch)


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}, {"shuffle_actions": True, "steps": 100}])
def test_without_steps_rate_or_matching_actions_nothing_is_learned(change, tmp_path, no_pictures):
    config = toy(**(CARTPOLE | {"rows": 2000} | change))
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    assert not summary["reached"]["return_bcq_cartpole_expert"]
    assert summary["metrics"]["return_bcq_cartpole_expert"] < 150


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_steps_from_a_file(env, tmp_path, no_pictures):
    logged_data.generate(env, "medium", 300, 0).save(tmp_path / "mine.npz")
    config = toy(**SMALL, envs=env, data=tmp_path / "mine.npz")
    found = execute(INFO, config, tmp_path / "run", toy=True)["metrics"]
    assert math.isfinite(found[f"return_bcq_{env.split('-')[0].lower()}_mine"])


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_unit_of_rewards_changes_nothing_that_is_learned(env, tmp_path, capsys):
    """A power of two to the last bit, another factor but for rounding; and it is said that the environment pays
    otherwise."""
    made, found = logged_data.generate(env, "medium", 600, 0), {}
    for factor in (1.0, 2.0**-7, 100.0):
        dataclasses.replace(made, rewards=made.rewards * factor).save(tmp_path / "log.npz")
        config = toy(**SMALL | {"steps": 10, "eval_every": 10, "compared": "iql"}, envs=env, data=tmp_path / "log.npz")
        found[factor] = numbers(execute(INFO, config, tmp_path / f"run{factor}", toy=True))
        assert ("the two are not compared" in capsys.readouterr().out) == (factor != 1)
        assert any(n.startswith("overestimate") for n in found[factor]) == (factor == 1)
    for name, value in found[1.0].items():
        if name.startswith("return"):
            assert found[2.0**-7][name] == value, name
            assert found[100.0][name] == pytest.approx(value, rel=0.3), name


# --- A log alone


ALONE = {"envs": "none", "hidden": 32, "steps": 300, "fqe_steps": 400, "eval_every": 100, "gamma": GAMMA, "lr": 1e-2,
         "polyak": 0.05, "target_every": 20, "candidates": 5, "act_candidates": 10}  # fmt: skip


@pytest.fixture
def kept(monkeypatch):
    """The learners of the last run, and its task."""
    found, train_all = {}, bcq.train_all

    def spy(cfg, run, task, learners):
        found.update(learners, task=task)
        return train_all(cfg, run, task, learners)

    monkeypatch.setattr(bcq, "train_all", spy)
    return found


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_log_alone_teaches_more_than_its_policy_by_fqe_and_in_truth(seed, tmp_path, kept):
    mdp = world(seed)
    policy = tables.uniform(mdp)
    tabular_log(tmp_path / "log.npz", mdp, policy, seed=seed)
    config = toy(**ALONE, data=tmp_path / "log.npz", seed=seed)
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    del kept["task"]
    check_learned_alone(summary, kept, mdp, policy, "bcq", lambda name: f"fqe_{name}_log_log")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_every_method_for_continuous_actions_learns_from_a_log_alone(seed, tmp_path, kept):
    """Cloning finds the mean of the uniform actions, which pays more than they do; the others find what pays more."""
    behavior = continuous_log(tmp_path / "log.npz", seed=seed)
    config = toy(**ALONE, data=tmp_path / "log.npz", compared="bc,td3,td3_bc,iql,awac", seed=seed, action_low="-1",
                 action_high="1", temperature=10.0, awac_lam=0.1, phi=0.2)  # fmt: skip
    found = numbers(execute(INFO, config, tmp_path / "run", toy=True))
    scale = kept.pop("task").scale
    assert found["fqe_behavior_log_log"] == pytest.approx(behavior, abs=0.15 * abs(behavior))
    truth = {}
    for name, learner in kept.items():
        truth[name] = continuous_value(
            lambda seen, learner=learner: scale.to_env(
                learner.act(scale.observations(seen), torch.Generator().manual_seed(0))
            )
        )
        assert found[f"fqe_{name}_log_log"] == pytest.approx(truth[name], abs=0.15 * abs(behavior)), name
    assert set(truth) == {"bcq", "bc", "td3", "td3_bc", "iql", "awac"}
    for name in ("bcq", "td3", "td3_bc", "iql", "awac"):
        assert truth[name] > behavior / 2, name


@pytest.mark.usefixtures("no_pictures")
def test_a_run_from_a_log_alone_resumes_to_the_same_result(tmp_path):
    tabular_log(tmp_path / "log.npz", world(0), tables.uniform(world(0)), episodes=30)
    config = toy(**ALONE | {"steps": 10, "fqe_steps": 10}, data=tmp_path / "log.npz")
    config.checkpoint_every = 2
    whole = execute(INFO, config, tmp_path / "whole", toy=True)
    execute(INFO, config, tmp_path / "cut", toy=True)
    (tmp_path / "cut/summary.json").unlink()
    shutil.rmtree(tmp_path / "cut/checkpoints/log_log_fqe/step_000004")
    again = execute(INFO, config, tmp_path / "cut", toy=True, resume=True)
    assert again["metrics"] == whole["metrics"]
    assert again["checks"] == whole["checks"]


def test_names_are_plain_whatever_environment_and_file_are_called():
    for env, name, wanted in (
        ("CartPole-v1", "expert", "cartpole_expert"),
        ("mine:My-World-v0", "a log", "my_world_a_log"),
        ("my.mod:space/Grid-v12", "x:y/é", "grid_x_y"),
    ):
        assert data.task_name(env, name) == wanted


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    made = logged_data.generate("CartPole-v1", "random", 100, 0)
    made.rewards[3] = math.nan
    made.save(tmp_path / "nan.npz")
    np.savez(tmp_path / "short.npz", observations=made.observations.numpy())
    made.rewards[3] = 1.0
    made.save(tmp_path / "cart.npz")
    for name, env, message in (
        ("nan.npz", "CartPole-v1", r"rewards\[3\] is nan"),
        ("short.npz", "CartPole-v1", "has no actions, rewards"),
        ("none.npz", "CartPole-v1", "there is no such file"),
        ("cart.npz", "Pendulum-v1", "actions are discrete, those of Pendulum-v1 continuous"),
    ):
        with pytest.raises(UserError, match=message):
            execute(INFO, toy(**SMALL, envs=env, data=tmp_path / name), tmp_path / env / name, toy=True)


def test_bad_settings_are_refused(tmp_path):
    for change, message in (
        ({"tau": 1.5}, "--tau 1.5 is too large: it must be at most 1"),
        ({"candidates": 0}, "--candidates 0 is too small"),
        ({"sweep": "0,two"}, "--sweep: 'two' is not a threshold"),
        ({"reward_scale": 0.0}, "--reward-scale 0 is too small: it must be above 0"),
        ({"data": tmp_path / "x.npz"}, "name it with --envs, or learn from the log alone with --envs none"),
        ({"envs": "none"}, "--envs names no environment"),
        ({"action_low": "0"}, "--action-low is for learning from a log alone"),
        ({"data": tmp_path / "x.npz", "envs": "none", "env_arg": ("a=1",)}, "--env-arg is for the environment of"),
        ({"envs": "Pendulum-v1,Pendulum-v1"}, "--envs: 'Pendulum-v1' is there twice"),
        ({"hidden": 10**9}, "--hidden 1000000000 is too large"),
    ):
        with pytest.raises(UserError, match=message):
            toy(**change)
    with pytest.raises(UserError, match="'narrow' is none of the sets of CartPole-v1"):
        execute(INFO, toy(discrete_sets="narrow"), tmp_path / "run", toy=True)
