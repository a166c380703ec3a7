"""Preprocessing: bit for bit what transformers' processors give, and one line for every file that is not supported."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.errors import UserError
from finetune.vision import preprocess
from finetune.vision.preprocess import Preprocessor


def picture(height, width, mode="RGB", seed=0):
    bands = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if bands == 1 else values, mode)


def theirs(kind):
    if kind == "CLIP":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as found
    elif kind == "Llava":
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as found
    elif kind == "LlavaNext":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil as found
    elif kind == "Blip":
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as found
    else:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as found
    return found


SETTINGS = [
    {},
    {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 28}},
    {"size": {"shortest_edge": 31}, "do_center_crop": False, "resample": 2},
    {"size": {"height": 20, "width": 33}, "do_center_crop": False, "resample": 1},
    {"size": {"height": 20, "width": 33}, "do_center_crop": True, "crop_size": {"height": 29, "width": 30}},
    {"size": 26, "crop_size": 25, "do_center_crop": True, "resample": 0},
    {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 55, "width": 15}},
    {"size": {"height": 9, "width": 9}, "do_center_crop": False, "image_mean": 0.3, "image_std": [0.2, 0.5, 1.5]},
    {"size": {"height": 9, "width": 9}, "do_center_crop": False, "do_normalize": False, "rescale_factor": 1 / 127.5},
    {"size": {"height": 9, "width": 9}, "do_center_crop": False, "do_rescale": False},
]


@pytest.mark.peer
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "Blip", "Llava"])
@pytest.mark.filterwarnings("ignore:'mode' parameter")
def test_every_bit_equals_transformers(tmp_path, kind, settings):
    """Folders that transformers wrote; images that are wide, high, gray, transparent and small."""
    other = theirs(kind)(**settings)
    other.save_pretrained(tmp_path)
    ours = preprocess.load(tmp_path)
    for i, (height, width, mode) in enumerate(
        [(40, 61, "RGB"), (61, 40, "RGB"), (33, 33, "L"), (50, 21, "RGBA"), (7, 11, "LA"), (300, 280, "RGB")]
    ):
        image = picture(height, width, mode, i)
        expected = torch.as_tensor(other(image, return_tensors="pt")["pixel_values"][0])
        assert torch.equal(ours(image), expected.float()), (height, width, mode)


@pytest.mark.peer
@pytest.mark.parametrize(
    "settings",
    [
        {"do_pad": True, "size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
        {"do_pad": True, "size": {"height": 16, "width": 16}, "do_center_crop": False, "image_mean": [0.5] * 3},
        {"do_pad": True, "do_resize": False, "crop_size": {"height": 30, "width": 30}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:'mode' parameter")
def test_padding_to_a_square_equals_transformers(tmp_path, settings):
    """LLaVA-1.5's: with the mean as a color, before anything is scaled."""
    other = theirs("Llava")(**settings)
    other.save_pretrained(tmp_path)
    ours = preprocess.load(tmp_path)
    for i, (height, width, mode) in enumerate([(40, 61, "RGB"), (61, 40, "RGB"), (33, 33, "L"), (50, 21, "RGBA")]):
        image = picture(height, width, mode, i)
        expected = torch.as_tensor(other(image, return_tensors="pt")["pixel_values"][0])
        assert torch.equal(ours(image), expected.float()), (height, width, mode)


@pytest.mark.peer
def test_palettes_and_the_whole_processors_file(tmp_path):
    """A palette with a transparent color; the settings as a processor with a tokenizer saves them."""
    other = theirs("CLIP")(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    image = picture(20, 30).quantize(8)
    image.info["transparency"] = 3
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": other.to_dict()}))
    ours = preprocess.load(tmp_path)
    assert torch.equal(ours(image), other(image, return_tensors="pt")["pixel_values"][0])


def test_old_files_of_the_hub():
    """openai/clip-vit-base-patch32's, and one with nulls as SigLIP's older files have them."""
    old = {"crop_size": 224, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3,
           "size": 224}  # fmt: skip
    found = preprocess.read_config(old, "f")
    assert (found.shortest, found.size, found.crop) == (224, None, (224, 224))
    assert found.mean == (0.48145466, 0.4578275, 0.40821073)
    nulls = {"image_processor_type": "SiglipImageProcessorFast", "do_convert_rgb": None, "do_pad": None}
    found = preprocess.read_config(nulls, "f")
    assert (found.shortest, found.size, found.crop, found.convert_rgb) == (0, (224, 224), None, True)
    assert found.std == (0.5, 0.5, 0.5)


def test_steps_by_definition():
    white, black = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8))
    found = Preprocessor(mean=(0.5,) * 3, std=(0.25,) * 3)
    assert found(white).unique().tolist() == [2.0]
    assert found(black).unique().tolist() == [-2.0]
    assert found.batch([white, black]).shape == (2, 3, 8, 8)
    cut = Preprocessor(crop=(2, 12))(white)
    assert cut.shape == (3, 2, 12)
    assert cut[0, 0].tolist() == [0] * 2 + [1] * 8 + [0] * 2
    with pytest.raises(UserError, match="image 1 comes out as 9×8 and image 0 as 8×8"):
        found.batch([white, Image.new("RGB", (8, 9))])
    with pytest.raises(UserError, match=r"40000×1 would be scaled to a side of 400,000 pixels"):
        Preprocessor(shortest=10)(Image.new("RGB", (40000, 1)))
    with pytest.raises(UserError, match="mode L where do_convert_rgb is false"):
        Preprocessor(convert_rgb=False)(Image.new("L", (4, 4)))


BAD = [
    ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type = 'ViTImageProcessor' is not supported"),
    ({"image_processor_type": ["CLIPImageProcessor"]}, "is not supported"),
    ({"image_processor_type": None}, "image_processor_type = None"),
    ({"do_pad": True}, "do_pad = True is not supported"),
    ({"size": {"longest_edge": 20}}, "longest_edge"),
    ({"size": {"height": 20}}, "size must have shortest_edge alone, or height and width"),
    ({"size": {"shortest_edge": 20, "height": 20, "width": 20}}, "shortest_edge alone"),
    ({"size": 0}, "size is 0"),
    ({"crop_size": {"shortest_edge": 20}}, "crop_size needs height and width"),
    ({"image_mean": [0.5, 0.5]}, "image_mean has 2 numbers"),
    ({"image_std": [0.5, 0.0, 0.5]}, "image_std[1] is 0.0"),
    ({"resample": 6}, "resample is 6"),
    ({"do_resize": "yes"}, "do_resize is 'yes'"),
    ({"rescale_factor": 0}, "rescale_factor is 0"),
]


@pytest.mark.parametrize(("change", "says"), BAD, ids=[str(change) for change, _ in BAD])
def test_settings_that_are_not_supported_are_one_line(tmp_path, change, says):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"} | change))
    with pytest.raises(UserError) as caught:
        preprocess.load(tmp_path)
    assert says in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"holds no preprocessor_config\.json"):
        preprocess.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        preprocess.load(tmp_path)
    bare = {"image_processor_type": "SiglipImageProcessor", "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(bare))
    with pytest.raises(UserError, match="there is no crop_size"):
        preprocess.load(tmp_path)
