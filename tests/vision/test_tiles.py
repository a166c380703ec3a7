"""Images of any resolution as tiles: transformers' bits, and transformers' order behind the encoder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.errors import UserError
from finetune.vision import tiles

GRID = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
SIZES = [(20, 20), (15, 60), (60, 15), (33, 47), (7, 90), (100, 31), (16, 32)]


def picture(height, width):
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.peer
@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
        {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}, "resample": 2},
    ],
    ids=str,
)
def test_tiles_equal_transformers(tmp_path, settings):
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    other = LlavaNextImageProcessorPil(image_grid_pinpoints=GRID, **settings)
    other.save_pretrained(tmp_path)
    ours = tiles.load(tmp_path)
    for height, width in SIZES:
        image = picture(height, width)
        expected = torch.as_tensor(other(image, return_tensors="pt")["pixel_values"][0]).float()
        assert torch.equal(ours(image), expected), (height, width)


@pytest.mark.peer
def test_the_packed_order_equals_transformers():
    import transformers
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    config = transformers.LlavaNextConfig(image_grid_pinpoints=GRID)
    config.vision_config.image_size, config.vision_config.patch_size = 16, 4
    stand_in = type("Model", (), {"config": config})()
    newline = torch.randn(3)
    for size in SIZES:
        height, width = tiles.best(size, GRID)
        features = torch.randn(1 + height // 16 * (width // 16), 16, 3)
        expected, _ = LlavaNextModel.pack_image_features(stand_in, [features], torch.tensor([size]), "default", newline)
        assert torch.equal(tiles.packed(features, size, GRID, 16, newline), expected[0]), size


def test_a_wide_image_keeps_its_proportions():
    """Twice as wide as high: two tiles next to each other, and no patch is padding."""
    assert tiles.best((20, 40), GRID) == [16, 32]
    assert tiles.fitted((20, 40), (16, 32)) == (16, 32)
    assert tiles.fitted((10, 40), (16, 32)) == (8, 32)
    grid = torch.arange(8 * 16).view(8, 16, 1)
    assert torch.equal(tiles.unpadded(grid, (10, 40)), grid[2:6])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "cuts no tiles"),
        ({"image_grid_pinpoints": [[20, 16]]}, "20×16 is not a whole number of tiles of 16"),
        ({"image_grid_pinpoints": [[160, 160]]}, "100 tiles, at most 64"),
        ({"image_grid_pinpoints": [[16, 0]]}, r"image_grid_pinpoints\[0\]\[1\] is 0"),
        ({"do_resize": False}, "do_resize = False is not supported"),
    ],
    ids=str,
)
def test_a_tiling_that_is_not_supported_is_one_line(tmp_path, change, says):
    written = {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 16}}
    written |= {"crop_size": {"height": 16, "width": 16}, "image_grid_pinpoints": GRID} | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=says):
        tiles.load(tmp_path)


def test_features_of_another_tiling_are_refused():
    with pytest.raises(UserError, match="has 3 tiles"):
        tiles.packed(torch.zeros(4, 16, 3), (20, 40), GRID, 16, torch.zeros(3))
