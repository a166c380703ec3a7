"""The model of the flamingo module: its blocks next to open_flamingo's, what a token sees, what is frozen."""

import importlib.util

import pytest
import torch

from finetune.data.toy_directory import small_config, small_llama
from finetune.errors import UserError
from finetune.lm.cache import KVCache
from finetune.lm.gpt import GPT, GPTConfig
from finetune.runs import registry
from finetune.vision.vit import ViT, ViTConfig

model, convert = (registry.part("flamingo", name) for name in ("model", "convert"))
VOCABULARY = 50
IMAGE, END = VOCABULARY + 1, VOCABULARY


def shape(**changes):
    given = {"vision_dim": 16, "dim": 64, "latents": 3, "depth": 2, "heads": 2, "head_dim": 8} | changes
    return model.FlamingoConfig(**given)


def flamingo(seed=0, awake=True, **changes):
    """A small Flamingo; `awake`: gates away from 0, so that images matter."""
    torch.manual_seed(seed)
    encoder = ViT(ViTConfig(8, 8, 4, 16, 1, 2, channels=1))
    net = model.Flamingo(encoder, small_llama(small_config(VOCABULARY, 64)), shape(**changes))
    for name, p in net.named_parameters():
        if awake and name.endswith("_gate"):
            p.data.fill_(0.7)
    return net


def pictures(*rows_and_images, seed=1):
    return torch.randn(*rows_and_images, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def sequence(*places, length=6):
    """Text tokens, with images at `places`."""
    tokens = torch.arange(3, 3 + length)
    tokens[list(places)] = IMAGE
    return tokens[None]


# --- The blocks as open_flamingo has them


@pytest.fixture(scope="module")
def helpers():
    """open_flamingo/src/helpers.py, which can be loaded alone: the package itself needs open_clip."""
    package = importlib.util.find_spec("open_flamingo")
    spec = importlib.util.spec_from_file_location("helpers", f"{package.submodule_search_locations[0]}/src/helpers.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.peer
@pytest.mark.parametrize(("frames", "places"), [(0, 0), (4, 0), (4, 5)])
def test_the_resampler_equals_open_flamingos(helpers, frames, places):
    net = flamingo(frames=frames, places=places)
    theirs = helpers.PerceiverResampler(
        dim=16, depth=2, dim_head=8, heads=2, num_latents=3, max_num_frames=frames or None, max_num_media=places or None
    )
    ours = {k.removeprefix("perceiver."): v for k, v in convert.state(net).items() if k.startswith("perceiver.")}
    theirs.load_state_dict(ours)
    x = torch.randn(2, 3, 3 if frames else 1, 4, 16)
    torch.testing.assert_close(net.resampler(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("only_preceding", [True, False])
def test_the_gated_layer_equals_open_flamingos(helpers, only_preceding):
    net = flamingo(only_preceding=only_preceding)
    theirs = helpers.GatedCrossAttentionBlock(
        dim=64, dim_visual=16, dim_head=8, heads=2, only_attend_immediate_media=only_preceding
    )
    prefix = "lang_encoder.gated_cross_attn_layers.1."
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in convert.state(net).items() if k.startswith(prefix)})
    locations = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]]).bool()
    x, latents = torch.randn(2, 6, 64), torch.randn(2, 2, 3, 16)
    ours = net.gated["1"]
    before = torch.zeros(2, dtype=torch.int64)
    mask = model.media_mask(locations, 2, 3, before, only_preceding)
    found, wanted = ours(x, ours.attn.keys(latents.flatten(1, 2)), mask), theirs(x, latents, locations)
    seen = mask.any(2)  # open_flamingo with all images: text in front of the first sees the mean of all, a leak
    torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-5, atol=1e-5)
    if only_preceding:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# --- What a token sees


def test_the_mask_of_images():
    shown = torch.tensor([[0, 1, 0, 0, 1, 0]]).bool()
    none = torch.zeros(1, dtype=torch.int64)
    last = model.media_mask(shown, 2, 2, none)
    assert last.int().tolist()[0] == [[0, 0, 0, 0]] + 3 * [[1, 1, 0, 0]] + 2 * [[0, 0, 1, 1]]
    every = model.media_mask(shown, 2, 2, none, only_preceding=False)
    assert every.int().tolist()[0] == [[0, 0, 0, 0]] + 3 * [[1, 1, 0, 0]] + 2 * [[1, 1, 1, 1]]
    later = model.media_mask(torch.zeros(1, 2).bool(), 2, 2, none + 2)  # behind a cache that holds both
    assert later.int().tolist()[0] == 2 * [[0, 0, 1, 1]]


@torch.no_grad()
def test_another_image_changes_the_text_behind_it_only():
    """The gated layer by itself: with the second image perturbed, tokens 4 and 5 change; token 0 gets exactly 0."""
    net = flamingo()
    layer, images = net.gated["0"], pictures(1, 2)
    locations = torch.tensor([[0, 1, 0, 0, 1, 0]]).bool()
    mask = model.media_mask(locations, 2, 3, torch.zeros(1, dtype=torch.int64))
    x = torch.randn(1, 6, 64)
    other = images.clone()
    other[:, 1] += 1
    a, b = (
        layer.attn(layer.norm(x), layer.attn.keys(net.resampler(net.features(each)).flatten(1, 2)), mask)
        for each in (images, other)
    )
    assert (a != b).any(2)[0].tolist() == [False] * 4 + [True] * 2
    assert (a[0, 0] == 0).all()
    assert (a[0, 1:] != 0).any(1).all()


@torch.no_grad()
def test_the_whole_model_sees_an_image_from_its_place_on():
    net, tokens, images = flamingo(), sequence(1, 4), pictures(1, 2)
    other = images.clone()
    other[:, 0] += 1
    a, b = (net(tokens, net.media(net.features(each))) for each in (images, other))
    assert (a != b).any(2)[0].tolist() == [False] + [True] * 5  # self-attention carries it further than the mask does


# --- What is frozen


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2])
def test_the_untrained_model_is_its_language_model(every):
    net = flamingo(awake=False, every=every)
    assert [*net.gated] == ["0", "1"][every - 1 :]
    text = sequence()
    torch.testing.assert_close(net(text)[..., :-1], net.language_model(text), rtol=0, atol=1e-6)
    tokens, images = sequence(1, 4), pictures(1, 2)
    theirs = net.language_model(tokens.clamp(max=END - 1), embedded=net.embeddings(tokens))
    torch.testing.assert_close(net(tokens, net.media(net.features(images)))[..., :-1], theirs, rtol=0, atol=1e-6)


def test_only_the_added_parts_get_gradients():
    net, tokens = flamingo(), sequence(1, 4)
    frozen = [p for name, p in net.named_parameters() if name.startswith(("encoder.", "language_model."))]
    before = [p.clone() for p in frozen]
    assert {name.split(".")[0] for name in net.trained()} == {"resampler", "gated", "added"}
    optimizer = torch.optim.SGD(net.trained().values(), lr=0.1)
    net(tokens, net.media(net.features(pictures(1, 2)))).square().mean().backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in net.trained().values())
    assert all(p.grad is None for p in frozen)
    assert all(map(torch.equal, frozen, before))


def test_at_closed_gates_only_the_gates_learn():
    """What makes the start slow, and a higher learning rate of the gates worth its line."""
    net, tokens = flamingo(awake=False), sequence(1, 4)
    net(tokens, net.media(net.features(pictures(1, 2)))).square().mean().backward()
    learning = {name for name, p in net.trained().items() if p.grad is not None and p.grad.any()}
    assert learning == {"added"} | {f"gated.{i}.{gate}_gate" for i in (0, 1) for gate in ("attn", "mlp")}


@torch.no_grad()
def test_what_is_trained_is_saved_alone(tmp_path):
    net, other = flamingo(places=2, frames=2), flamingo(seed=5, places=2, frames=2)
    other.language_model.load_state_dict(net.language_model.state_dict())
    other.encoder.load_state_dict(net.encoder.state_dict())
    convert.save(net, tmp_path)
    convert.load(other, tmp_path)
    tokens, images = sequence(1, 4), pictures(1, 2)
    assert torch.equal(*(each(tokens, each.media(each.features(images))) for each in (net, other)))
    size = (tmp_path / "flamingo.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in net.trained().values()) + 10_000
    with pytest.raises(UserError, match="another shape"):
        convert.load(flamingo(), tmp_path)
    (tmp_path / "flamingo.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"flamingo\.safetensors is damaged"):
        convert.load(other, tmp_path)


# --- Batches, cache, generation


@torch.no_grad()
@pytest.mark.parametrize("places", [(0,), (3,), (1, 4), ()])
def test_a_row_alone_equals_itself_in_a_batch(places):
    """An image first, in the middle, two of them or none, next to a longer row with two images."""
    net = flamingo()
    row, longer = sequence(*places, length=6), sequence(2, 5, length=9)
    images = pictures(2, 2)
    alone = net(row, net.media(net.features(images[:1, : len(places)])))
    for count in (0, 1):  # the row's padding may hold anything, a placeholder too
        padded = torch.cat([row, torch.full((1, 3), IMAGE if count else 0)], 1)
        media = net.media(net.features(images), torch.tensor([len(places), 2]))
        lengths = torch.tensor([6, 9])
        batch = net(torch.cat([padded, longer]), media, lengths=lengths)
        torch.testing.assert_close(batch[:1, :6], alone, rtol=1e-5, atol=1e-5)
        padded = torch.cat([padded[:, 6:], row], 1)
        batch = net(torch.cat([padded, longer]), media, lengths=lengths, side="left")
        torch.testing.assert_close(batch[:1, 3:], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_a_cache_gives_what_the_whole_sequence_gives(cut):
    """Also with an image behind the cut: what the cache holds is counted."""
    net, tokens = flamingo(), sequence(1, 4)
    features = net.features(pictures(1, 2))
    whole = net(tokens, net.media(features))
    media, cache = net.media(features), KVCache(net.language_model, 1, 6)
    parts = [net(part, media, cache=cache) for part in (tokens[:, :cut], tokens[:, cut:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_generation_equals_a_forward_pass_for_every_token():
    net = flamingo()
    rows = torch.cat([sequence(1, 4, length=8), sequence(0, length=8)])
    lengths, counts, images = torch.tensor([8, 5]), torch.tensor([2, 1]), pictures(2, 2)
    media = net.media(net.features(images), counts)
    found = net.generate(rows, media, lengths=lengths, most=7)
    assert media.seen.tolist() == [0, 0]  # may be used again
    for i, answer in enumerate(found):
        tokens = rows[i, : lengths[i]].tolist()
        for token in answer:
            alone = net.media(net.features(images[i : i + 1, : counts[i]]))
            assert int(net(torch.tensor([tokens]), alone)[0, -1].argmax()) == token
            tokens.append(token)
    assert all(len(answer) == 7 for answer in found)


@torch.no_grad()
def test_generation_stops_at_the_end_of_the_chunk():
    net, tokens = flamingo(), sequence(1, 4)
    media = net.media(net.features(pictures(1, 2)))
    first = net.generate(tokens, media, most=3)[0]
    assert len(first) == 3
    hidden = net.hidden(torch.cat([tokens, torch.tensor([first[:2]])], 1), media)[0]
    apart = hidden[-1] - hidden[-3:-1].T @ torch.linalg.lstsq(hidden[-3:-1].T, hidden[-1, :, None]).solution[:, 0]
    net.added[0] = apart * 1e4  # large at the third new token, 0 at the first two
    assert net.generate(tokens, media, most=9) == [first[:2]]
    assert net.logits(hidden).shape[-1] == END + 1  # an image cannot be generated


# --- Clips


def test_frames_in_another_order_are_another_clip():
    clip = pictures(1, 1, 3)
    with torch.no_grad():
        timed, untimed = flamingo(frames=4), flamingo()
        a, b = (timed.resampler(timed.features(each)) for each in (clip, clip.flip(2)))
        assert (a - b).abs().max() > 1e-2
        untimed.resampler.frames = torch.nn.Parameter(torch.zeros(4, 16))  # without embeddings of time: a set of frames
        a, b = (untimed.resampler(untimed.features(each)) for each in (clip, clip.flip(2)))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.shape == (1, 1, 3, 16)  # as many latents as an image has


def test_the_order_of_frames_is_learned():
    """Two frames, one of which is bright: first or last? Without embeddings of time it cannot be known."""
    right = {True: [], False: []}
    for timed in (True, False):
        net = flamingo(frames=2, awake=False)
        if not timed:
            net.resampler.frames = torch.nn.Parameter(torch.zeros(2, 16), requires_grad=False)
        gates = [p for name, p in net.trained().items() if name.endswith("_gate")]
        rest = [p for name, p in net.trained().items() if not name.endswith("_gate")]
        optimizer = torch.optim.AdamW([{"params": gates, "lr": 0.1}, {"params": rest, "lr": 3e-3}])
        tokens = torch.tensor([[IMAGE]])
        for step in range(60):
            g = torch.Generator().manual_seed(step)
            first = torch.randint(2, (32,), generator=g)
            clips = 0.3 * torch.randn(32, 1, 2, 1, 8, 8, generator=g)
            clips[torch.arange(32), 0, 1 - first] += 1
            logits = net(tokens.expand(32, 1), net.media(net.features(clips)))[:, -1, [7, 8]]
            torch.nn.functional.cross_entropy(logits, first).backward()
            if step >= 50:  # of clips that are new
                right[timed].append((logits.argmax(1) == first).float().mean().item())
            optimizer.step()
            optimizer.zero_grad()
    assert sum(right[True]) / 10 > 0.9
    assert sum(right[False]) / 10 < 0.65


# --- Refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda net: net(sequence(1, 4), net.media(net.features(pictures(1, 1)))), "row 0 .* 2 placeholders for 1 im"),
        (lambda net: net(sequence(1), net.media(net.features(pictures(1, 2)))), "row 0 .* 1 placeholders for 2 images"),
        (lambda net: net(sequence(1)), "1 placeholders for 0 images"),
        (lambda net: net(torch.tensor([[IMAGE + 1]])), f"token {IMAGE + 1}: the last one is {IMAGE}"),
        (lambda net: net.features(torch.zeros(1, 8, 8)), r"not \(batch, images"),
        (lambda net: net.media(net.features(pictures(1, 1, 2))), "a clip of 2 frames: the resampler takes images only"),
        (lambda net: flamingo(every=3), "every 3: the language model has only 2 blocks"),
        (lambda net: flamingo(vision_dim=8), "vision_dim is 8, but the frozen model's width is 16"),
        (lambda net: flamingo(heads=0), "heads of at least 1"),
        (
            lambda net: model.Flamingo(net.encoder, GPT(GPTConfig(9, 64, 1, 1)), shape()),
            "Flamingo wraps a Llama, not a GPT",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make(flamingo())
