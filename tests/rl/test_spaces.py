"""finetune.rl.envs.spaces: observations as vectors and images, actions as numbers and vectors."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from small_games import LAYOUTS, Catch

from finetune.errors import UserError
from finetune.rl.agents import networks
from finetune.rl.envs import environments, spaces
from finetune.rl.envs.replay import Replay, Transitions
from finetune.rl.envs.vector import VectorEnv

OBSERVED = {
    "scalar": Box(-1, 1, ()),
    "matrix": Box(-1, 1, (2, 3)),
    "integers": Box(-5, 5, (3,), np.int32),
    "bytes": Box(0, 255, (7, 7, 3), np.uint8),  # smaller than an image
    "discrete": Discrete(4, start=-1),
    "multi_discrete": MultiDiscrete([2, 3, 4]),
    "multi_discrete_start": MultiDiscrete([2, 3], start=[5, -1]),
    "multi_discrete_matrix": MultiDiscrete([[2, 3], [4, 5]]),
    "multi_binary": MultiBinary([2, 2]),
    "dict": Dict({"z": Discrete(3, start=1), "a": Box(-1, 1, (2, 2)), "m": MultiDiscrete([2, 2])}),
    "tuple": Tuple((Discrete(2), Box(0, 1, (2,)), MultiBinary(3))),
    "nested": Dict(
        {"inner": Dict({"x": Discrete(2), "y": Tuple((Box(0, 1, (1,)), Discrete(3)))}), "b": MultiBinary(2)}
    ),
}


@pytest.mark.parametrize("name", OBSERVED)
def test_vectors_are_those_of_gymnasiums_flatten(name):
    space = OBSERVED[name]
    space.seed(0)
    seen = spaces.observations(space)
    for _ in range(20):
        observation = space.sample()
        vector = seen.vector(observation)
        assert vector.dtype == np.float32
        assert vector.shape == (seen.size,)
        np.testing.assert_array_equal(vector, gymnasium.spaces.flatten(space, observation).astype(np.float32))


@pytest.mark.parametrize("name", ["discrete", "multi_discrete", "multi_discrete_start", "multi_binary", "finite"])
def test_elements_of_finite_spaces_are_numbered(name):
    finite = Dict({"a": Discrete(3, start=2), "b": MultiBinary(2), "c": Tuple((MultiDiscrete([2, 2]), Discrete(1)))})
    space = finite if name == "finite" else OBSERVED[name]
    seen = spaces.observations(space)
    space.seed(0)
    found = {}
    for _ in range(2000):
        observation = space.sample()
        found.setdefault(seen.state(seen.vector(observation)), set()).add(repr(observation))
    assert sorted(found) == list(range(seen.states)), "every element has a number"
    assert all(len(elements) == 1 for elements in found.values()), "and no two the same"
    assert spaces.observations(OBSERVED["dict"]).states == 0


DISCRETE = {
    "discrete": Discrete(3, start=4),
    "multi_discrete": MultiDiscrete([2, 3]),
    "multi_discrete_start": MultiDiscrete([2, 3], start=[1, -2]),
    "multi_discrete_matrix": MultiDiscrete([[2, 3], [2, 1]]),
    "multi_binary": MultiBinary([2, 2]),
    "dict": Dict({"b": Discrete(2), "a": MultiDiscrete([2, 2])}),
    "tuple": Tuple((Discrete(2, start=1), Tuple((Discrete(2), MultiBinary(2))))),
}


@pytest.mark.parametrize("name", DISCRETE)
def test_every_discrete_action_is_one_of_the_space(name):
    actions = spaces.actions(DISCRETE[name])
    taken = [actions.to_env(a) for a in range(actions.count)]
    assert all(DISCRETE[name].contains(action) for action in taken), "of the space and of its type"
    assert len({repr(action) for action in taken}) == actions.count
    count = {"discrete": 3, "multi_binary": 16, "dict": 8, "tuple": 16, "multi_discrete_matrix": 12}.get(name, 6)
    assert actions.count == count


def test_boxes_of_any_number_of_axes_and_dicts_of_them_are_one_vector():
    space = Dict({"b": Box(-1, 2, (2, 2)), "a": Tuple((Box(0, 5, (1,), np.int64), Box(-np.inf, np.inf, ())))})
    actions = spaces.actions(space)
    assert actions.count == 0
    keys = list(space.spaces)
    vector = np.array([9, -9, 0.5, 1, 3.7, 1e3] if keys == ["b", "a"] else [3.7, 1e3, 9, -9, 0.5, 1], np.float32)
    taken = actions.to_env(vector)
    assert space.contains(taken)
    np.testing.assert_array_equal(taken["b"], np.array([[2, -1], [0.5, 1]], np.float32))
    assert (taken["a"][0].tolist(), float(taken["a"][1])) == ([4], 1e3)
    assert len(actions.low) == len(actions.high) == 6


def test_every_kind_of_space_says_what_becomes_of_it():
    assert {type(space).__name__ for space in (*OBSERVED.values(), *DISCRETE.values())} == set(environments.SPACES)
    assert all(str(kind) for kind in environments.SPACES.values())


# --- Images


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_is_found_and_its_channels_come_first_in_the_network(layout):
    said = []
    limit = environments.EpisodeLimit(report=said.append)
    gymnasium.register("finetune/Catch-v0", Catch, kwargs={"layout": layout})
    try:
        for _ in range(2):
            envs = environments.make("finetune/Catch-v0", 2, episode_limit=limit)
    finally:
        del gymnasium.registry["finetune/Catch-v0"]
    image = envs[0].observed
    assert (image.height, image.width, image.channels) == (8, 8, {"last": 3, "first": 3, "gray": 1}.get(layout, 2))
    assert len(said) == 1, "once, however often it is made"
    assert said[0].startswith("'finetune/Catch-v0': images of 8 × 8 (")
    assert ("last axis" in said[0], "first axis" in said[0]) == (layout in ("last", "floats"), layout == "first")

    torch.manual_seed(0)
    convolutions = networks.Convolutions(image)
    vector, _ = envs[0].reset(seed=3)
    raw = envs[0].unwrapped.image()
    plain = {"last": (2, 0, 1), "floats": (2, 0, 1), "first": (0, 1, 2), "gray": None, "stack": (0, 3, 1, 2)}[layout]
    pixels = raw[None] if plain is None else raw.transpose(plain).reshape(-1, 8, 8)
    x = torch.from_numpy(pixels.astype(np.float32))[None] / (1 if layout == "floats" else 255)
    first, second = convolutions.layers
    x = torch.relu(second(torch.nn.functional.pad(torch.relu(first(x)), (0, 1, 0, 1))))
    features = convolutions(torch.from_numpy(vector)[None])
    torch.testing.assert_close(features, x.flatten(1))
    assert features.shape == (1, convolutions.width)


def test_pixels_stay_bytes_through_rollouts_and_replay():
    gymnasium.register("finetune/Catch-v0", Catch)
    try:
        envs = environments.make("finetune/Catch-v0", 3)
        vector, again = VectorEnv(envs, 0), VectorEnv(environments.make("finetune/Catch-v0", 3), 0)
    finally:
        del gymnasium.registry["finetune/Catch-v0"]
    rollout = vector.collect(lambda obs: torch.ones(len(obs), dtype=torch.int64), 17)
    assert rollout.observations.dtype == rollout.next_observations.dtype == torch.uint8
    assert rollout.observations.max() == 255
    replay = Replay(100)
    replay.add(Transitions.n_step(rollout, 3, 0.9))
    assert replay.sample(5, torch.Generator()).observations.dtype == torch.uint8
    again.load_state_dict(vector.state_dict())
    assert np.array_equal(again.observations, vector.observations)


@pytest.mark.parametrize("side", [8, 35, 36, 84])
def test_several_networks_together_are_as_many_alone(side):
    torch.manual_seed(0)
    image = spaces.Image.of(Box(0, 255, (side, side + 1, 3), np.uint8))
    together, x = networks.Convolutions(image, 2), torch.randint(256, (2, 4, image.size), dtype=torch.uint8)
    found = together(x)
    assert found.shape == (2, 4, together.width)
    for i in range(2):
        alone = networks.Convolutions(image)
        for one, both in zip(alone.layers, together.layers, strict=True):
            one.weight.data, one.bias.data = both.weight.data.chunk(2)[i], both.bias.data.chunk(2)[i]
        torch.testing.assert_close(alone(x[i]), found[i])
        assert alone(x).shape == (2, 4, together.width), "any leading sizes"


@pytest.mark.parametrize("sides", [(8, 8), (8, 11), (12, 9), (35, 8), (36, 50), (84, 84), (97, 39)])
def test_every_pixel_reaches_the_features(sides):
    """Also those at the edge, where a stride does not fit."""
    torch.manual_seed(0)
    image = spaces.Image.of(Box(0, 255, sides, np.uint8))
    convolutions = networks.Convolutions(image)
    for layer in convolutions.layers:
        layer.weight.data.abs_()  # no ReLU is closed
    x = torch.ones(1, image.size, requires_grad=True)
    convolutions(x).sum().backward()
    assert (x.grad > 0).all()
    if sides == (84, 84):
        assert convolutions.width == 64 * 7 * 7, "DQN's network"


def test_what_is_no_image_is_a_vector():
    for box in (
        Box(0, 255, (7, 8, 3), np.uint8),  # too small
        Box(0, 255, (128,), np.uint8),
        Box(-1, 1, (9, 9, 3)),  # not from 0 on
        Box(0, np.inf, (9, 9, 3)),
        Box(0, 1, (20, 10)),  # a history of ten numbers, say
    ):
        assert spaces.observations(box).image is None, box
    inner = spaces.observations(Dict({"camera": Box(0, 255, (8, 8, 1), np.uint8), "speed": Box(-9, 9, (1,))}))
    assert inner.image is None
    found = inner.vector({"camera": np.full((8, 8, 1), 255, np.uint8), "speed": np.array([3.0], np.float32)})
    assert found[:64].tolist() == [1] * 64, "the pixels of a Dict are flat numbers from 0 to 1"
    assert found[64] == 3


def test_pixels_out_of_range_are_not_wrapped():
    seen = spaces.observations(Box(0, 255, (8, 8), np.uint8))
    assert seen.vector(np.full((8, 8), 200)).max() == 200
    for wrong in (np.full((8, 8), 256), np.full((8, 8), -1), np.full((8, 8), 0.5)):
        with pytest.raises(spaces.Fault, match="gave the observation"):
            seen.vector(wrong)


def test_a_method_without_convolutions_refuses_images():
    gymnasium.register("finetune/Catch-v0", Catch)
    try:
        (env,) = environments.make("finetune/Catch-v0", 1)
    finally:
        del gymnasium.registry["finetune/Catch-v0"]
    with pytest.raises(UserError, match=r"has images of 8 × 8 .*, and sac learns from vectors: use a2c"):
        environments.refuse_images(env, "sac", "use a2c")
