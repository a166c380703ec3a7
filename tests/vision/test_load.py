"""CLIP's and SigLIP's folders, written by transformers with random weights, give transformers' numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import UserError
from finetune.vision import load

pytestmark = pytest.mark.peer
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20,
    "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def written(folder, kind, **changed):
    """A model of transformers with random parameters (norms and biases too), and its folder."""
    import transformers

    torch.manual_seed(0)
    vision = VISION | {"image_size": 20, "patch_size": 6} | changed
    family = "CLIP" if kind.startswith("CLIP") else "Siglip"
    if kind in ("CLIPModel", "SiglipModel"):
        more = {"projection_dim": 12} if family == "CLIP" else {}
        config = getattr(transformers, f"{family}Config")(vision_config=vision, text_config=TEXT, **more)
    else:
        more = {"projection_dim": 12} if kind.endswith("Projection") else {}
        config = getattr(transformers, f"{family}VisionConfig")(**vision, **more)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    return model


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Blip2VisionModel", "Blip2ForConditionalGeneration"])
@torch.no_grad()
def test_blip2s_encoder_equals_transformers(tmp_path, kind):
    """EVA: one matrix for queries, keys and values; of the whole model the rest is passed over."""
    import transformers

    torch.manual_seed(0)
    vision = VISION | {"image_size": 20, "patch_size": 6}
    if kind == "Blip2VisionModel":
        config = transformers.Blip2VisionConfig(**vision)
    else:
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
        config = transformers.Blip2Config(
            vision_config=vision,
            qformer_config=small | {"intermediate_size": 16, "encoder_hidden_size": 32},
            text_config=small | {"model_type": "opt", "ffn_dim": 16, "word_embed_proj_dim": 16},
            num_query_tokens=2,
            image_token_index=19,
        )
    theirs = getattr(transformers, kind)(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.15)
    theirs.save_pretrained(tmp_path)
    ours, x = load.vit(tmp_path), images(2, 3, 20, 20)
    out = getattr(theirs, "vision_model", theirs)(x, output_hidden_states=True)
    close(ours.states(x, -2), out.hidden_states[-2])
    close(ours.norm(ours.states(x)), out.last_hidden_state)


KINDS = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel", "SiglipVisionModel", "SiglipModel")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_layer_and_the_pooled_vector_equal_transformers(tmp_path, kind):
    theirs = written(tmp_path, kind)
    ours, x = load.vit(tmp_path), images(3, 3, 20, 20)
    tower = getattr(theirs, "vision_model", theirs)
    out = tower(x, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    for layer in (0, 1, 2, 3, -1, -2):
        close(ours.states(x, layer), out.hidden_states[layer])
    close(ours(x), out.pooler_output)
    if "Siglip" in kind:
        close(ours.norm(ours.states(x)), out.last_hidden_state)
        assert ours.projection is None
        close(ours.compared(x), torch.nn.functional.normalize(out.pooler_output, dim=-1))
    else:
        close(ours.states(x), out.last_hidden_state)
    if kind in ("CLIPModel", "CLIPVisionModelWithProjection"):
        embedded = theirs.visual_projection(out.pooler_output)
        close(ours.compared(x), torch.nn.functional.normalize(embedded, dim=-1))
    else:
        assert ours.projection is None


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "SiglipVisionModel"])
@pytest.mark.parametrize(
    "changed",
    [
        {"image_size": 21, "patch_size": 7},
        {"image_size": 8, "patch_size": 8},  # one patch
        {"num_channels": 1, "hidden_act": "gelu", "layer_norm_eps": 0.1},
        {"hidden_act": "gelu_new", "num_attention_heads": 1},
        {"hidden_act": "quick_gelu", "num_hidden_layers": 1},
    ],
    ids=lambda changed: " ".join(f"{key}={value}" for key, value in changed.items()),
)
@torch.no_grad()
def test_other_shapes_equal_transformers(tmp_path, kind, changed):
    theirs, x = (
        written(tmp_path, kind, **changed),
        images(2, changed.get("num_channels", 3), *[changed.get("image_size", 20)] * 2),
    )
    close(load.vit(tmp_path)(x), theirs(x).pooler_output)


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "SiglipVisionModel"])
@torch.no_grad()
def test_images_of_another_and_no_square_size_equal_transformers(tmp_path, kind):
    theirs, ours = written(tmp_path, kind), load.vit(tmp_path)
    for height, width in ((26, 44), (12, 20), (40, 40)):
        x = images(2, 3, height, width)
        close(ours(x, interpolate=True), theirs(x, interpolate_pos_encoding=True).pooler_output)


@torch.no_grad()
def test_siglip_without_its_head_gives_features(tmp_path):
    theirs, x = written(tmp_path, "SiglipVisionModel", vision_use_head=False), images(1, 3, 20, 20)
    ours = load.vit(tmp_path)
    close(ours.norm(ours.features(x, -1)), theirs(x).last_hidden_state)


@torch.no_grad()
def test_old_names_half_precision_and_shards(tmp_path):
    """`vision_model.` before every name, position_ids, fp16, two files: as the hub's older folders are."""
    theirs, x = written(tmp_path, "CLIPVisionModel"), images(1, 3, 20, 20)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    old = {f"vision_model.{name}": tensor.half() for name, tensor in tensors.items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    names = sorted(old)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({name: old[name] for name in some}, tmp_path / file)
    index = {"weight_map": {name: file for file, some in files.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    ours = load.vit(tmp_path)
    for parameter in theirs.parameters():
        parameter.copy_(parameter.half())
    close(ours(x), theirs(x).pooler_output)
    assert load.vit(tmp_path, torch.bfloat16)(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "patch"), [("clip", 32), ("siglip", 16)])
def test_missing_keys_are_transformers_defaults(kind, patch):
    """The hub's SigLIP says of its vision part nothing but its model_type."""
    import transformers

    theirs = getattr(transformers, {"clip": "CLIPVisionConfig", "siglip": "SiglipVisionConfig"}[kind])()
    for raw in ({"model_type": kind}, {"model_type": f"{kind}_vision_model"}):
        ours = load.read_config(raw, "config.json")
        assert (ours.patch, ours.height, ours.dim) == (patch, theirs.image_size, theirs.hidden_size)
        assert (ours.layers, ours.heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
        assert (ours.hidden, ours.norm_eps) == (theirs.intermediate_size, theirs.layer_norm_eps)
        assert load.ACTIVATIONS[theirs.hidden_act] == ours.activation
    old = {"model_type": kind, "vision_config": {"hidden_size": 12}, "vision_config_dict": {"hidden_size": 24}}
    assert load.read_config(old, "config.json").dim == 24  # as transformers reads it


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


CONFIGS = [
    ({"model_type": "dinov2"}, "model_type = 'dinov2' is not supported (only clip"),
    ({"model_type": ["clip"]}, "model_type = ['clip'] is not supported"),
    ({"architectures": 5}, "architectures = 5 is not supported"),
    ({"model_type": None}, "model_type = None is not supported"),
    ({"architectures": ["CLIPForImageClassification"]}, "CLIPForImageClassification"),
    ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
    ({"image_size": [20, 20]}, "image_size is [20, 20]"),
    ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
    ({"num_attention_heads": 5}, "dim (32) must be a multiple of heads (5)"),
    ({"patch_size": 21}, "patches of 21 pixels"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"model_type": "blip_2_vision_model", "architectures": None, "qkv_bias": False}, "qkv_bias = False is not"),
    ({"num_hidden_layers": 4}, "tensor blocks.3."),
    ({"num_hidden_layers": 2}, "blocks.2."),
    ({"patch_size": 5}, "has shape"),
]
TENSORS = [
    (lambda t: t.pop("encoder.layers.1.mlp.fc1.weight"), "tensor blocks.1.mlp.up.weight is missing"),
    (lambda t: t.pop("head.attention.in_proj_bias"), "tensor pool.attn.q.bias is missing"),
    (lambda t: t.update({"encoder.layers.0.self_attn.rotary": torch.ones(2)}), "self_attn.rotary does not belong"),
    (lambda t: t.update({"head.attention.in_proj_weight": torch.ones(95, 32)}), "pool.attn.qkv.weight does not"),
    (lambda t: t.update({"embeddings.patch_embedding.weight": torch.ones(32, 6, 6, 3)}), "patch.weight has shape"),
    (lambda t: t.update({"post_layernorm.weight": torch.full((32,), torch.nan)}), "norm.weight holds NaN"),
    (lambda t: t.update({"post_layernorm.weight": torch.ones(32, dtype=torch.int8)}), "has dtype int8"),
]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    written(folder, "SiglipVisionModel")
    return folder


@pytest.fixture
def copy(siglip, tmp_path):
    for file in siglip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(("change", "says"), CONFIGS, ids=[str(change) for change, _ in CONFIGS])
def test_a_config_that_is_not_supported_is_one_line(copy, change, says):
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as caught:
        load.vit(copy)
    assert says in str(caught.value)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "says"), TENSORS, ids=[says for _, says in TENSORS])
def test_a_wrong_tensor_is_named(copy, change, says):
    rewrite(copy, change)
    with pytest.raises(UserError) as caught:
        load.vit(copy)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_folder_is_one_line(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        load.vit(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        load.vit(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load.vit(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load.vit(copy)
    with pytest.raises(UserError, match="there is no model"):
        load.vit(copy / "missing")
