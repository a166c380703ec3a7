"""rl.envs.offline_files and hdf5: logs as Minari, D4RL, CORL and d3rlpy write them, field by field; what is refused."""

import json
import re

import gymnasium
import numpy as np
import pytest
import torch

from finetune.errors import UserError
from finetune.rl.envs import environments, hdf5, logged_data, npz, offline_files
from finetune.runs import registry

h5py = pytest.importorskip("h5py")

# Three episodes of 3, 2 and 3 steps: the first terminates, the second is cut off, the third terminates.
LENGTHS, OVER, CUT = (3, 2, 3), (1, 0, 1), (0, 1, 0)
DRAW = np.random.default_rng(0)
SEEN = [DRAW.normal(size=(n + 1, 2)).astype(np.float32) for n in LENGTHS]  # with the last observation
TAKEN = [DRAW.integers(0, 3, n) for n in LENGTHS]
PAID = [DRAW.normal(size=n) for n in LENGTHS]
FLAGS = {name: [np.arange(n) == n - 1 if flag else np.zeros(n, bool) for n, flag in zip(LENGTHS, flags, strict=True)]
         for name, flags in (("terminations", OVER), ("truncations", CUT))}  # fmt: skip


def joined(parts):
    return np.concatenate(parts)


BEFORE, AFTER = joined([seen[:-1] for seen in SEEN]), joined([seen[1:] for seen in SEEN])
FLAT = {"observations": BEFORE, "actions": joined(TAKEN), "rewards": joined(PAID)}
TERMINALS, TIMEOUTS = joined(FLAGS["terminations"]), joined(FLAGS["truncations"])
LAST = np.cumsum(LENGTHS) - 1
CUT_ROW = 4  # the last step of the episode that a limit cut off


def written(path, arrays):
    """An HDF5 file of these arrays; a name with slashes is within groups."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def minari_arrays(seen=SEEN, taken=TAKEN):
    found = {}
    for i, (rewards, before) in enumerate(zip(PAID, seen, strict=True)):
        parts = before if isinstance(before, dict) else {"": before}
        found |= {f"episode_{i}/observations{name}": part for name, part in parts.items()}
        found |= {f"episode_{i}/actions": taken[i], f"episode_{i}/rewards": rewards, f"episode_{i}/infos/x": rewards}
        found |= {f"episode_{i}/{name}": flags[i] for name, flags in FLAGS.items()}
    return found


def d3rlpy_arrays():
    found = {"columns": ["observations"], "num_episodes": len(LENGTHS), "version": "2.1"}
    for i in range(len(LENGTHS)):
        found |= {f"observations_{i}": SEEN[i][:-1], f"actions_{i}": TAKEN[i][:, None],
                  f"rewards_{i}": PAID[i][:, None], f"terminated_{i}": bool(OVER[i])}  # fmt: skip
    return found


def column(array):
    return array[:, None]


D4RL = FLAT | {"terminals": TERMINALS, "timeouts": TIMEOUTS}
D4RL_MORE = {"infos/qpos": BEFORE, "metadata/algorithm": np.bytes_("sac")}
CASES = {
    "d4rl hdf5": ("d4rl", D4RL | D4RL_MORE, "derived"),
    "d4rl hdf5 with next_observations": ("d4rl", D4RL | {"next_observations": AFTER}, "all"),
    "d4rl float flags in columns": (
        "d4rl", FLAT | {"terminals": column(TERMINALS.astype(np.float32)), "timeouts": column(TIMEOUTS.astype("u1")),
                        "rewards": column(joined(PAID)), "actions": column(joined(TAKEN).astype("u1"))}, "derived",
    ),
    "corl": ("corl", FLAT | {"next_observations": AFTER, "terminals": TERMINALS.astype(np.float32)}, "all"),
    "done at a limit too": (
        "columns", FLAT | {"next_obs": AFTER, "done": TERMINALS | TIMEOUTS, "truncated": TIMEOUTS}, "all",
    ),
    "columns": ("columns", FLAT | {"terminated": TERMINALS, "truncated": TIMEOUTS}, "derived"),
    "d3rlpy 1": (
        "d3rlpy1", FLAT | {"terminals": TERMINALS, "episode_terminals": TERMINALS | TIMEOUTS, "discrete_action": True,
                           "version": "1.0"}, "derived",
    ),
    "d3rlpy 2": ("d3rlpy", d3rlpy_arrays(), "derived"),
    "minari": ("minari", minari_arrays(), "all"),
}  # fmt: skip


def check(data, known):
    """Every field, against the three episodes above."""
    assert torch.equal(data.observations, torch.from_numpy(BEFORE))
    assert data.actions.dtype == torch.int64
    assert data.actions.tolist() == joined(TAKEN).tolist()
    assert torch.equal(data.rewards, torch.from_numpy(joined(PAID).astype(np.float32)))
    assert data.terminations.tolist() == TERMINALS.tolist()
    assert data.truncations.tolist() == TIMEOUTS.tolist()
    rows = [row for row in range(len(BEFORE)) if known == "all" or row != CUT_ROW]
    steps = data.transitions()
    assert torch.equal(steps.observations, torch.from_numpy(BEFORE[rows]))
    assert steps.actions.tolist() == joined(TAKEN)[rows].tolist()
    assert steps.terminated.tolist() == TERMINALS[rows].tolist()
    bootstrapped = ~TERMINALS[rows]
    assert torch.equal(steps.next_observations[bootstrapped], torch.from_numpy(AFTER[rows][bootstrapped]))
    assert data.returns() == pytest.approx([rewards.astype(np.float32).sum() for rewards in PAID])
    assert data.starts().tolist() == [0, 3, 5]


@pytest.mark.parametrize("case", CASES)
def test_every_format_gives_the_same_steps(case, tmp_path):
    form, arrays, known = CASES[case]
    files = [written(tmp_path / "log.h5", arrays)]
    if not any("/" in name or name.endswith("_0") for name in arrays):
        np.savez(tmp_path / "log.npz", **arrays)
        files.append(tmp_path / "log.npz")
    for path in files:
        said = []
        check(logged_data.load(path, report=said.append), known)
        assert f"{path.name}: format {form}, 8 steps, 3 whole episodes" in said[0]
        assert len(said) == 1
        assert ("the observation after 1 of them is not known" in said[0]) == (known == "derived")
        check(logged_data.load(path, form), known)
    assert form in offline_files.FORMATS


def test_d4rls_steps_are_those_of_its_qlearning_dataset(tmp_path):
    """Its loop, written out; but the last row, which it never keeps, is kept here where it is terminal."""
    wanted = []
    for i in range(len(BEFORE) - 1):
        if TIMEOUTS[i]:
            continue
        wanted.append((BEFORE[i], BEFORE[i + 1], bool(TERMINALS[i]), np.float32(joined(PAID)[i])))
    steps = logged_data.load(written(tmp_path / "d.hdf5", D4RL)).transitions()
    assert len(steps) == len(wanted) + 1
    for i, (before, after, over, paid) in enumerate(wanted):
        assert np.array_equal(steps.observations[i], before)
        assert over or np.array_equal(steps.next_observations[i], after)
        assert (bool(steps.terminated[i]), steps.rewards[i].item()) == (over, paid)


@pytest.mark.slow
@pytest.mark.peer
def test_what_d3rlpy_writes_is_what_d3rlpy_trains_on(tmp_path):
    d3rlpy = pytest.importorskip("d3rlpy")
    from d3rlpy.dataset import BasicTransitionPicker, MDPDataset

    made = MDPDataset(
        BEFORE,
        joined(TAKEN),
        joined(PAID).astype(np.float32),
        TERMINALS.astype(np.float32),
        TIMEOUTS.astype(np.float32),
    )
    with (tmp_path / "dump.h5").open("w+b") as file:
        made.dump(file)
    data = logged_data.load(tmp_path / "dump.h5")
    check(data, "derived")
    pick, theirs = BasicTransitionPicker(), []
    for episode in made.episodes:
        theirs += [pick(episode, i) for i in range(episode.transition_count)]
    steps = data.transitions()
    assert len(steps) == len(theirs)
    for i, one in enumerate(theirs):
        assert np.array_equal(steps.observations[i], one.observation)
        assert steps.actions[i] == one.action[0]
        assert steps.rewards[i] == one.reward[0]
        assert steps.terminated[i] == one.terminal
        assert one.terminal or np.array_equal(steps.next_observations[i], one.next_observation)
    assert d3rlpy.__version__


@pytest.mark.peer
def test_what_minari_writes_is_read(tmp_path, monkeypatch):
    """A dataset with states and actions that are Discrete, and one with a Dict of observations."""
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import minari
    from gymnasium import spaces
    from minari.data_collector.episode_buffer import EpisodeBuffer

    def buffers(observations, actions):
        return [
            EpisodeBuffer(observations=seen, actions=taken, rewards=rewards.tolist(), terminations=over.tolist(),
                          truncations=cut.tolist())
            for seen, taken, rewards, over, cut in zip(observations, actions, PAID, *FLAGS.values(), strict=True)
        ]  # fmt: skip

    states = [DRAW.integers(2, 7, n + 1) for n in LENGTHS]
    minari.create_dataset_from_buffers(
        "test/states-v0", buffers([list(s) for s in states], [list(t + 1) for t in TAKEN]),
        observation_space=spaces.Discrete(6, start=2), action_space=spaces.Discrete(3, start=1),
    )  # fmt: skip
    said = []
    folder = tmp_path / "test/states-v0"
    data, spaces_ = logged_data.load(folder, report=said.append).alone()
    assert "format minari, 8 steps" in said[0]
    assert (spaces_.obs_dim, spaces_.action_dim) == (6, 3)
    assert data.observations.argmax(1).tolist() == joined([s[:-1] - 2 for s in states]).tolist()
    assert data.next_observations.argmax(1).tolist() == joined([s[1:] - 2 for s in states]).tolist()
    assert data.actions.tolist() == joined(TAKEN).tolist()

    space = spaces.Dict({"b": spaces.Box(-9, 9, (2,)), "a": spaces.Discrete(3)})
    kinds = [DRAW.integers(0, 3, n + 1) for n in LENGTHS]
    rows = [{"a": k, "b": s} for k, s in zip(kinds, SEEN, strict=True)]
    minari.create_dataset_from_buffers(
        "test/dict-v0", buffers(rows, [np.array(t) for t in TAKEN]),
        observation_space=space, action_space=spaces.Discrete(3),
    )  # fmt: skip
    data = logged_data.load(tmp_path / "test/dict-v0/data/main_data.hdf5")
    flat = [
        np.stack([spaces.flatten(space, {"a": k[i], "b": s[i]}) for i in range(len(s))])
        for k, s in zip(kinds, SEEN, strict=True)
    ]
    assert torch.equal(data.observations, torch.from_numpy(joined([f[:-1] for f in flat]).astype(np.float32)))
    assert torch.equal(data.next_observations, torch.from_numpy(joined([f[1:] for f in flat]).astype(np.float32)))
    assert data.name == "dict-v0"


@pytest.mark.parametrize("module", ["cql", "bcq"])
def test_the_readme_of_a_module_lists_the_formats(module):
    text = (registry.find(module).folder / "README.md").read_text()
    for name, form in offline_files.FORMATS.items():
        assert f"| `{name}` | {form.description} |" in text, name


# --- States, actions


def states_file(folder, dtype=np.int64, shape=(-1,), **changes):
    states = np.array([0, 1, 3, 2, 2]).astype(dtype).reshape(shape)
    after = np.array([1, 3, 0, 2, 1]).astype(dtype).reshape(shape)
    arrays = {"observations": states, "next_observations": after, "actions": np.array([0, 1, 1, 0, 2]),
              "rewards": np.ones(5), "terminations": np.arange(5) == 2, "truncations": np.arange(5) == 4}  # fmt: skip
    np.savez(folder / "states.npz", **arrays | changes)
    return folder / "states.npz"


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_integer_states_are_one_hot(shape, tmp_path):
    data, spaces = logged_data.load(states_file(tmp_path, shape=shape)).alone()
    assert data.observations.tolist() == torch.eye(4)[[0, 1, 3, 2, 2]].tolist()
    assert data.next_observations.tolist() == torch.eye(4)[[1, 3, 0, 2, 1]].tolist()
    assert (spaces.obs_dim, spaces.action_dim) == (4, 3)
    assert logged_data.load(states_file(tmp_path, np.uint8, shape)).alone(states=9)[1].obs_dim == 9
    for given, message in ((3, r"observations\[2\] is state 3, --states has 0 … 2"), (10**6, "1,000,000 states")):
        with pytest.raises(UserError, match=message):
            logged_data.load(states_file(tmp_path, shape=shape)).alone(states=given)


def test_integer_states_are_the_environments(tmp_path):
    env = environments.make("FrozenLake-v1", 1)[0]
    for dtype in (np.int32, np.float32):  # d3rlpy keeps states as floats (N, 1)
        data = logged_data.load(states_file(tmp_path, dtype, (-1, 1))).fit(env)
        assert data.observations.tolist() == torch.eye(16)[[0, 1, 3, 2, 2]].tolist()
    path = states_file(tmp_path, observations=np.array([0, 1, 16, 2, 2]))
    with pytest.raises(UserError, match=r"observations\[2\] is state 16, FrozenLake-v1 has 0 … 15"):
        logged_data.load(path).fit(env)


def test_bounds_of_actions_are_the_logged_range_and_its_margin_or_given(tmp_path):
    taken = np.array([[-1.0, 0], [1, 0], [0, 0], [0.5, 0], [0, 0]])
    data = logged_data.load(states_file(tmp_path, actions=taken))
    spaces = data.alone()[1]
    assert [bound.tolist() for bound in spaces.bounds] == [pytest.approx([-1.02, -0.01]), pytest.approx([1.02, 0.01])]
    spaces = data.alone(low="-2,-1", high="1")[1]
    assert [bound.tolist() for bound in spaces.bounds] == [[-2, -1], [1, 1]]
    for low, high, message in (
        ("x", "1", "--action-low 'x' is not a number"), ("-1", "0.5", "exclude logged actions: they are"),
        ("1,2,3", "", "one finite number, or 2"), ("-1", "0", "exclude"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            data.alone(low=low, high=high)
    with pytest.raises(UserError, match="the actions of states are discrete"):
        logged_data.load(states_file(tmp_path)).alone(low="1")


def test_a_share_of_the_episodes_are_held_out(tmp_path):
    data = logged_data.load(written(tmp_path / "log.h5", D4RL))
    rest, held = data.split(0.5, torch.Generator().manual_seed(0))
    assert len(rest) + len(held) == 8
    assert sorted(rest.returns() + held.returns()) == sorted(data.returns())
    assert len(rest.returns())
    assert len(held.returns())
    assert len(rest.transitions()) + len(held.transitions()) == 7
    one = logged_data.load(written(tmp_path / "one.h5", {n: a[:3] for n, a in D4RL.items()}))
    assert one.split(0.5, torch.Generator())[1] is None


class Parts(gymnasium.Env):
    """An environment of several discrete parts."""

    observation_space = gymnasium.spaces.MultiDiscrete([3, 2])
    action_space = gymnasium.spaces.MultiDiscrete([2, 3], start=[0, 1])

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.int64), {}

    def step(self, action):
        return np.zeros(2, np.int64), 0.0, True, False, {}


def test_several_discrete_parts_are_coded_as_the_environment_codes_them(tmp_path):
    seen, after = np.array([[0, 1], [2, 0], [1, 1], [0, 0], [2, 1]]), np.array([[2, 1], [1, 0]] + [[0, 0]] * 3)
    taken = np.array([[0, 1], [1, 3], [0, 3], [1, 1], [1, 2]])
    path = states_file(tmp_path, observations=seen, next_observations=after, actions=taken)
    env = environments.Env(Parts(), "Parts", 5, environments.EpisodeLimit())
    data = logged_data.load(path).fit(env)
    for i in range(5):
        assert data.observations[i].tolist() == env.vector(seen[i]).tolist()
        assert data.next_observations[i].tolist() == env.vector(after[i]).tolist()
        assert env.to_env(int(data.actions[i])).tolist() == taken[i].tolist()
    alone, spaces = logged_data.load(path).alone()
    assert alone.actions.tolist() == data.actions.tolist()
    assert spaces.action_dim == 6
    taken[3, 1] = 4
    with pytest.raises(UserError, match=r"actions\[3, 1\] is 4, Parts has 1 … 3"):
        logged_data.load(states_file(tmp_path, observations=seen, next_observations=after, actions=taken)).fit(env)
    many = logged_data.load(states_file(tmp_path, actions=np.array([[0, 0]] * 4 + [[900, 900]])))
    with pytest.raises(UserError, match="integer actions of 2 parts have 811,801 combinations"):
        many.alone()


# --- Images


def images(rows, shape):
    """An image of uint8 for each row of numbers."""
    found = [np.resize(np.frombuffer(row.tobytes(), np.uint8), shape) for row in rows.astype(np.float32)]
    return np.stack(found)


@pytest.mark.parametrize("shape", [(8, 9, 3), (3, 8, 9), (8, 9), (2, 8, 9, 1)])
@pytest.mark.parametrize("case", CASES)
def test_images_of_every_format_stay_bytes(case, shape, tmp_path):
    form, arrays, _ = CASES[case]
    arrays = {
        name: images(array, shape) if re.search("observations|next_obs", name) else array
        for name, array in arrays.items()
        if name != "columns" and not name.startswith(("infos", "metadata"))
    }
    data = logged_data.load(written(tmp_path / "log.h5", arrays), form)
    assert data.observations.dtype == data.next_observations.dtype == torch.uint8
    assert data.shape == data.image.shape == shape
    assert (data.image.height, data.image.width) == (8, 9)
    assert np.array_equal(data.observations.numpy(), images(BEFORE, shape).reshape(8, -1))
    after = ~data.terminations & (torch.ones(8, dtype=torch.bool) if data.known is None else data.known)
    assert np.array_equal(data.next_observations[after].numpy(), images(AFTER, shape).reshape(8, -1)[after.numpy()])
    data.save(tmp_path / "again.npz")
    again = logged_data.load(tmp_path / "again.npz")
    assert again.shape == shape
    assert torch.equal(again.observations, data.observations)
    assert torch.equal(again.next_observations, data.next_observations)
    alone, spaces = again.alone()
    assert spaces.observed == data.image
    assert alone.observations.dtype == torch.uint8


def test_bytes_of_several_axes_too_small_for_an_image_are_numbers(tmp_path):
    seen = images(BEFORE, (4, 4, 3))
    data = logged_data.load(written(tmp_path / "log.h5", {**D4RL, "observations": seen}))
    assert data.image is None
    assert data.observations.dtype == torch.float32
    assert np.array_equal(data.observations.numpy(), seen.reshape(8, -1))


def test_pixels_count_as_a_quarter_of_the_numbers_that_are_read():
    assert npz.count((10, 8, 8, 3), np.dtype(np.uint8)) == 480
    assert npz.count((10, 8, 8, 3), np.dtype(np.float32)) == npz.count((10, 192), np.dtype(np.uint8)) == 1920


# --- What is refused


def minari_with(**changes):
    arrays = minari_arrays() | changes
    return {name: array for name, array in arrays.items() if array is not None}


def d3rlpy_with(**changes):
    return d3rlpy_arrays() | changes


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({**FLAT, "terminals": TERMINALS}, "it has terminals, but neither truncations .or timeouts. nor next_obs"),
        ({**D4RL, "episode_terminals": TERMINALS}, "its names fit d4rl and d3rlpy1: choose one with --data-format"),
        ({**D4RL, "rewards": np.where(np.arange(8) == 5, np.nan, 1)}, r"rewards\[5\] is nan"),
        ({**D4RL, "terminals": TERMINALS * 0.5}, r"terminals\[2\] is 0.5: it must be 0 or 1"),
        ({**D4RL, "timeouts": TIMEOUTS[:5]}, "truncations has 5 rows, rewards has 8"),
        (
            {**D4RL, "observations": np.zeros((8, 9, 9, 3), "u1"), "next_observations": np.zeros((8, 3, 9, 9), "u1")},
            r"observations are \(8, 9, 9, 3\), next_observations \(8, 3, 9, 9\)",
        ),
        (
            {**D4RL, "observations": np.zeros((8, 9, 9, 3), "u1"), "next_observations": np.zeros((8, 9, 9, 3))},
            "observations are uint8, next_observations float64: write both as uint8",
        ),
        ({**D4RL, "observations": [b"a"] * 8}, "observations holds .* values: only numbers are read"),
        ({"x": np.zeros(3)}, "it has no observations, actions, rewards, terminations, truncations.*it holds x"),
        (minari_with(**{"episode_1/rewards": np.zeros(5)}), "episode_1/observations has 3 rows, rewards has 5"),
        (minari_with(**{"episode_1/actions": None}), "it has no episode_1/actions"),
        (minari_with(**{"episode_1/rewards": np.array([0, np.inf])}), r"episode_1/rewards\[1\] is inf"),
        (minari_with(**{"episode_2/observations": np.full((4, 2), 1e20)}), r"episode_2/observations\[0\] has a number"),
        (minari_with(**{"episode_2/observations": np.zeros((4, 5))}), r"episode_2/observations has shape \(3, 5\)"),
        (minari_with(**{"episode_0/terminations": [1, 0, 0]}), "episode_0 ends at step 0, before its last, 2"),
        (minari_with(**{"episode_0/actions": None, "episode_0/actions/a": TAKEN[0]}), "episode_0/actions is a group"),
        (minari_arrays(taken=[np.zeros((n, 2, 2)) for n in LENGTHS]), r"actions has shape \(8, 2, 2\)"),
        (
            minari_arrays(seen=[{"/a": np.zeros(n + 1, int), "/b": s} for n, s in zip(LENGTHS, SEEN, strict=True)]),
            "episode_0/observations/a holds integers, and no metadata.json says how many",
        ),
        (d3rlpy_with(num_episodes=4), "num_episodes is 4, and there are 3 arrays rewards_0"),
        (d3rlpy_with(terminated_1=np.array([0, 1])), r"terminated_1 has shape \(2,\): it must be one finite number"),
        (d3rlpy_with(rewards_1=np.array([[0], [np.nan]])), r"rewards_1\[1\] is"),
        (d3rlpy_with(observations_0_0=SEEN[0]), "its observations are tuples"),
    ],
)
def test_what_is_wrong_is_named(arrays, message, tmp_path):
    path = written(tmp_path / "log.hdf5", arrays)
    with pytest.raises(UserError, match=message) as error:
        logged_data.load(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_an_ambiguous_file_is_read_as_it_is_said(tmp_path):
    path = written(tmp_path / "log.h5", {**D4RL, "episode_terminals": np.arange(8) % 2 == 1})
    check(logged_data.load(path, "d4rl"), "derived")
    with pytest.raises(UserError, match=r"--data-format 'd4r' is not one of auto, columns.*did you mean 'd4rl'"):
        logged_data.load(path, "d4r")


def test_links_out_of_a_file_and_objects_are_not_followed(tmp_path):
    other, path = written(tmp_path / "other.h5", D4RL), tmp_path / "log.h5"
    for what in ("external link", "soft link", "external storage", "virtual"):
        with h5py.File(path, "w") as file:
            for name, array in D4RL.items():
                if name != "rewards":
                    file[name] = array
                elif what == "external link":
                    file[name] = h5py.ExternalLink(str(other), name)
                elif what == "soft link":
                    file[name] = h5py.SoftLink("/timeouts")
                elif what == "external storage":
                    (tmp_path / "raw").write_bytes(bytes(64))
                    file.create_dataset(name, (8,), "f8", external=[(str(tmp_path / "raw"), 0, 64)])
                else:
                    layout = h5py.VirtualLayout(shape=(8,), dtype="f8")
                    layout[:] = h5py.VirtualSource(str(other), name, shape=(8,))
                    file.create_virtual_dataset(name, layout)
        with pytest.raises(UserError, match=r"rewards is a link|rewards keeps its numbers in other files"):
            logged_data.load(path)


def test_more_numbers_than_are_taken_and_damage_are_refused(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        for name, array in D4RL.items():
            file[name] = array if name != "rewards" else array[:1]
        del file["rewards"]
        file.create_dataset("rewards", (10**12,), "f8", chunks=(10**6,), compression="gzip")
    with pytest.raises(UserError, match="rewards is 1000000000000, too many numbers"):
        logged_data.load(tmp_path / "bomb.h5")
    whole = written(tmp_path / "log.h5", D4RL).read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "head.h5").write_bytes(hdf5.SIGNATURE + bytes(100))
    for name in ("cut.h5", "head.h5"):
        with pytest.raises(UserError, match=f"{name} is not a readable HDF5 file"):
            logged_data.load(tmp_path / name)
    draw, lines = np.random.default_rng(0), []
    for _ in range(60):
        bad = bytearray(whole)
        for at in draw.integers(0, len(bad), 3):
            bad[at] = draw.integers(256)
        (tmp_path / "bad.h5").write_bytes(bad)
        try:
            logged_data.load(tmp_path / "bad.h5")
        except UserError as e:
            lines.append(str(e))
    assert lines
    assert not any("\n" in line for line in lines)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(
        UserError, match=r"log.h5 is an HDF5 file, which h5py reads: pip install 'finetune-lab\[data\]'"
    ):
        logged_data.load(tmp_path / "log.h5")


def test_pickles_and_folders_of_other_kinds_are_refused_by_name(tmp_path):
    import pickle

    (tmp_path / "log.pkl").write_bytes(pickle.dumps({"observations": BEFORE}))
    arrow = tmp_path / "arrow/data"
    arrow.mkdir(parents=True)
    (arrow / "metadata.json").write_text(json.dumps({"data_format": "arrow"}))
    for path, message in (
        (
            tmp_path / "log.pkl",
            "is a pickle, which can run any code when it is read: write its arrays with numpy.savez",
        ),
        (tmp_path / "arrow", "is a Minari dataset without main_data.hdf5: its Arrow and Parquet storage is not read"),
        (tmp_path, "is a folder, not a file: of folders, only a Minari dataset"),
    ):
        with pytest.raises(UserError, match=message):
            logged_data.load(path)
