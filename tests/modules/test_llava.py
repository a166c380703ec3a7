"""The llava module: the model, its rows and stages, and what it learns to see."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data import image_rows
from finetune.data.packing import IGNORE
from finetune.errors import UserError
from finetune.lm.llama import LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import registry
from finetune.runs.run import execute
from finetune.vision.vit import ViTConfig

INFO = registry.find("llava")
main = registry.load(INFO)
model, data, files, sight, cost, plots = (
    registry.part("llava", name) for name in ("model", "data", "files", "sight", "cost", "plots")
)
TOKEN, EACH = 90, 16


def tiny(seed=0, **changed):
    """A model of random parameters: images of 16×16 become 16 vectors each."""
    torch.manual_seed(seed)
    vision = ViTConfig(16, 16, 4, 16, 3, 2, patch_bias=False, pre_norm=True)
    text = LlamaConfig(91, 24, 2, 4, 2, 48, max_length=128)
    net = model.Llava(model.LlavaConfig(vision, text, TOKEN, **changed)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return net


def pictures(count, seed=1):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def prompt(*parts):
    """Tokens: an image for each "i", else a word of this number."""
    return [token for part in parts for token in ([TOKEN] * EACH if part == "i" else [part])]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- The model


def test_an_image_stands_in_the_places_of_its_tokens():
    """Before any training: the input at an image token is the projected feature, at a word its embedding."""
    net, images = tiny(), pictures(2)
    tokens = torch.tensor([prompt(5, "i", 6), prompt("i", 7, 8)])
    plain, x = net.embed(tokens, net.project(images))
    features = net.encoder.states(images, -2)[:, 1:]
    expected = net.projector(features)
    assert torch.equal(x[0, 1:17], expected[0])
    assert torch.equal(x[1, :16], expected[1])
    assert torch.equal(x[0, [0, 17]], net.language.embed.weight[[5, 6]])
    assert not (plain == TOKEN).any()


def test_the_projector_is_two_layers_with_an_exact_gelu():
    net = tiny()
    x = torch.randn(3, 16)
    one, two = net.projector.linear_1, net.projector.linear_2
    h = x @ one.weight.T + one.bias
    h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    close(net.projector(x), h @ two.weight.T + two.bias, 1e-6)


def test_columns_are_means_of_strips(tmp_path):
    net, images = tiny(columns=2), pictures(2)
    patches = net.encoder.states(images, -2)[:, 1:].unflatten(1, (4, 4))
    close(net.encode(images)[:, 0], patches[:, :, :2].mean((1, 2)))
    close(net.encode(images)[:, 1], patches[:, :, 2:].mean((1, 2)))
    files.write(net, tmp_path)
    back = files.read(tmp_path)
    tokens = torch.tensor([[5, TOKEN, TOKEN, 6]])
    close(back(tokens, images[:1]), net(tokens, images[:1]))
    with pytest.raises(UserError, match=r"3 columns need .* a divisor of the 4 across"):
        tiny(columns=3)


def test_a_row_and_its_images_must_agree():
    net = tiny()
    with pytest.raises(UserError, match="the rows have 32 image tokens, the images give 16 vectors"):
        net(torch.tensor([prompt("i", "i")]), pictures(1))
    with pytest.raises(UserError, match="have 16 image tokens, the images give 0"):
        net(torch.tensor([prompt("i")]))


ROWS = [prompt(5, "i", 6, 7), prompt("i", 8), prompt(9, 10, 11), prompt(3, "i", 4, "i", 2)]
COUNTS = [1, 1, 0, 2]


def padded(rows, side):
    longest = max(map(len, rows))
    tokens, mask = torch.full((len(rows), longest), 77), torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        tokens[i, place], mask[i, place] = torch.tensor(row), 1
    return tokens, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_alone_equals_itself_in_a_padded_batch(side):
    """Image first, in the middle, twice, and next to a row without one."""
    net, images = tiny(), pictures(4)
    tokens, mask = padded(ROWS, side)
    together = net(tokens, images, mask=mask)
    for i, row in enumerate(ROWS):
        start = sum(COUNTS[:i])
        own = images[start : start + COUNTS[i]] if COUNTS[i] else None
        close(together[i][mask[i].bool()], net(torch.tensor([row]), own)[0])


def test_a_row_with_a_cache_equals_itself_without():
    from finetune.lm.cache import KVCache

    net, images = tiny(), pictures(2)
    row = ROWS[3]
    whole = net(torch.tensor([row]), images)
    cache = KVCache(net.language, 1, 64)
    vectors = net.project(images)
    first = net(torch.tensor([row[:-1]]), vectors=vectors, cache=cache)
    close(first, whole[:, :-1])
    close(net(torch.tensor([row[-1:]]), cache=cache), whole[:, -1:])


def test_two_images_keep_their_order():
    net, images = tiny(), pictures(2)
    tokens = torch.tensor([prompt("i", 4, "i", 2)])
    there, back = net(tokens, images), net(tokens, images.flip(0))
    assert (there - back).abs().max() > 1e-3
    _, x = net.embed(tokens, net.project(images))
    assert torch.equal(x[0, 17:33], net.project(images[1:])[0])


def test_a_cached_image_answers_as_the_image_itself():
    """Greedy generation by whole forwards, next to the one with caches, for prompts of different lengths."""
    net, images = tiny(), pictures(4)
    vectors = net.project(images)
    found = net.generate(ROWS, vectors, 5)
    for i, row in enumerate(ROWS):
        start, tokens = sum(COUNTS[:i]), list(row)
        for _ in range(5):
            own = vectors[start : start + COUNTS[i]] if COUNTS[i] else None
            tokens.append(int(net(torch.tensor([tokens]), vectors=own)[0, -1].argmax()))
        assert found[i] == tokens[len(row) :], i
    stop = found[0][1]
    assert net.generate(ROWS[:1], vectors[:1], 5, {stop})[0] == found[0][: found[0].index(stop) + 1]


@pytest.mark.parametrize(
    ("rows", "count", "says"),
    [([[]], 3, "a prompt is empty"), ([[1] * 120], 20, "120 tokens and 20 new ones exceed the model's 128")],
)
def test_a_prompt_that_cannot_be_answered(rows, count, says):
    with pytest.raises(UserError, match=says):
        tiny().generate(rows, None, count)


def test_the_attention_of_the_pictures_is_the_models(monkeypatch):
    """The weights over the image's tokens: those of the op that the model itself runs."""
    net, images = tiny(), pictures(1)
    row = prompt(5, "i", 6, 7)
    vectors = net.project(images)
    found = plots.attention_to_image(net, row, vectors)
    from finetune import ops

    seen, op = [], ops.attention

    def spy(q, k, v, **rules):
        scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float().repeat_interleave(2, 2)) * q.shape[-1] ** -0.5
        seen.append(scores[0, :, -1].softmax(-1).mean(0)[1:17])
        return op(q, k, v, **rules)

    monkeypatch.setattr(ops, "attention", spy)
    net(torch.tensor([row]), vectors=vectors)
    close(found, torch.stack(seen))


# --- Next to transformers


def hf_model(folder, strategy="default", tied=True):
    import transformers

    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = transformers.LlamaConfig(
        vocab_size=91, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=128,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=TOKEN, tie_word_embeddings=tied,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.peer
@pytest.mark.parametrize(("strategy", "tied", "each"), [("default", True, 16), ("full", False, 17)])
@torch.no_grad()
def test_logits_and_loss_equal_transformers(tmp_path, strategy, tied, each):
    theirs = hf_model(tmp_path, strategy, tied)
    ours = files.read(tmp_path)
    assert ours.config.each == each
    rows = [[5, *[TOKEN] * each, 6, 7], [*[TOKEN] * each, 8]]
    tokens, mask = padded(rows, "left")
    images = pictures(2)
    labels = tokens.masked_fill((tokens == TOKEN) | (mask == 0), -100)
    out = theirs(input_ids=tokens, pixel_values=images, attention_mask=mask, labels=labels)
    logits = ours(tokens, images, mask=mask)
    close(logits[mask.bool()], out.logits[mask.bool()])
    states = ours(tokens, images, mask=mask, hidden=True)
    targets = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    close(model.answer_loss(ours.language, states, targets), out.loss, 1e-6)
    alone = theirs.generate(
        input_ids=torch.tensor(rows[:1]), pixel_values=images[:1], max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert ours.generate(rows[:1], ours.project(images[:1]), 6)[0] == alone[0, len(rows[0]) :].tolist()


@pytest.mark.peer
@torch.no_grad()
def test_transformers_opens_a_folder_of_ours(tmp_path):
    """The model and its processor; an image token behind the vocabulary gets a row in the table."""
    import transformers

    tokenizer = Tokenizer.train(["which digit is on the left? seven"], 300)
    torch.manual_seed(1)
    net = tiny()
    text = LlamaConfig(tokenizer.vocab_size, 24, 2, 4, 2, 48, max_length=128)
    net = model.Llava(model.LlavaConfig(net.config.vision, text, tokenizer.vocab_size), net.encoder)
    files.write(net, tmp_path, tokenizer)
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 16), dtype=np.uint8))
    given = processor(images=image.convert("RGB"), text="a <image> left?", return_tensors="pt")
    out = theirs.eval()(**given)
    from finetune.vision import pretrain

    x = pretrain.inputs(torch.from_numpy(np.asarray(image).copy())[None, None])
    torch.testing.assert_close(x, given["pixel_values"])
    writer = data.Writer(tokenizer, net.config.image_token, net.config.each)
    ids, _ = writer.encode(f"a {data.SIGN} left?", [])
    assert ids == given["input_ids"][0].tolist()
    close(net(torch.tensor([ids]), x), out.logits[..., : tokenizer.vocab_size])
    back = files.read(tmp_path)
    close(back(torch.tensor([ids]), x), out.logits)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llava_next"}, "model_type = 'llava_next' is not supported"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act = 'relu' is not supported"),
        ({"vision_feature_layer": [-2, -1]}, "names several layers"),
        ({"image_token_index": None}, "image_token_index is missing"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias = False is not supported"),
    ],
    ids=str,
)
def test_a_config_that_is_not_supported_is_one_line(change, says):
    raw = files.write_config(tiny().config) | change
    with pytest.raises(UserError, match=says):
        files.read_config(raw, "config.json")


# --- Rows


@pytest.fixture
def writer():
    words = "Which digit is on the left? right? seven three What is <image> user assistant"
    tokenizer = Tokenizer.train([words] * 3, 330)
    return data.Writer(tokenizer, tokenizer.vocab_size, 4)


def saved(folder, rows):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


ROW = {
    "id": "1",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhich digit is on the left?"},
        {"from": "gpt", "value": "seven"},
        {"from": "human", "value": "right?"},
        {"from": "gpt", "value": "three"},
    ],
}


def test_labels_are_the_answers_shifted_once(tmp_path, writer):
    """No image position and no prompt is learned; each target is the next token."""
    rows = data.tokenize(image_rows.read(saved(tmp_path, [ROW])), writer, 200, print)
    batch = data.collate(rows)
    tokens, targets = batch.tokens[0], batch.targets[0]
    learned = (targets != IGNORE).nonzero()[:, 0]
    assert torch.equal(targets[learned], tokens[learned + 1])
    assert not (targets == writer.image_token).any()
    said = writer.tokenizer.decode(targets[learned].tolist())
    assert said == "seven<|im_end|>three<|im_end|>"
    assert int((tokens == writer.image_token).sum()) == 4
    before = writer.prompt(image_rows.read(tmp_path / "rows.jsonl")[0].messages[:1])
    assert learned[0] == len(before) - 1


def test_an_image_tag_that_a_user_types_is_text(tmp_path, writer):
    """Written in a part of text, it stays text, even if the tokenizer has a token of that name."""
    typed = {
        "role": "user",
        "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "is <image> x?"}],
    }
    path = saved(tmp_path, [{"messages": [typed, {"role": "assistant", "content": "seven"}]}])
    with_token = files.with_image(writer.tokenizer, writer.image_token)
    assert with_token.backend.token_to_id("<image>") == writer.image_token
    for tokenizer in (writer.tokenizer, with_token):
        (row,) = data.tokenize(image_rows.read(path), data.Writer(tokenizer, writer.image_token, 4), 200, print)
        assert row.ids.count(writer.image_token) == 4
        assert "is <image> x?" in tokenizer.decode([i for i in row.ids if i != writer.image_token])


def test_a_row_too_long_is_cut_but_never_an_image(tmp_path, writer):
    found = image_rows.read(saved(tmp_path, [ROW]))
    (whole,) = data.tokenize(found, writer, 200, print)
    told = []
    (cut,) = data.tokenize(found, writer, len(whole) - 2, told.append)
    assert cut.ids == whole.ids[:-2]
    assert told == [f"of 1 rows 1 were cut to {len(whole) - 2} tokens, 0 without an answer dropped"]
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: .*a\.png .*it takes at least (\d+)") as caught:
        data.tokenize(found, writer, 6, print)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    (kept,) = data.tokenize(found, writer, least, print)
    assert kept.ids.count(writer.image_token) == 4
    with pytest.raises(UserError, match="leaves nothing to learn"):
        data.tokenize(found, writer, least - 1, print)


def test_an_image_behind_an_answer_is_not_cut_either(tmp_path, writer):
    """The second image of a conversation, which the length would cut, is named; the answer before it is not enough."""
    turns = [*ROW["conversations"][:2], {"from": "human", "value": "<image> right?"}, {"from": "gpt", "value": "three"}]
    found = image_rows.read(saved(tmp_path, [{"images": ["a.png", "b.png"], "conversations": turns}]))
    (whole,) = data.tokenize(found, writer, 200, print)
    second = len(whole) - 1 - whole.ids[::-1].index(writer.image_token)
    with pytest.raises(UserError, match=r"b\.png"):
        data.tokenize(found, writer, second, print)
    assert whole.images == (tmp_path / "a.png", tmp_path / "b.png")


def test_batches_are_of_similar_length_and_hold_every_row():
    lengths = torch.randint(10, 90, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = data.grouped(lengths, 8, torch.Generator().manual_seed(1))
    assert sorted(i for batch in batches for i in batch) == list(range(640))
    apart = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(apart) / len(apart) < 12  # 60 or more in a random order
    again = data.grouped(lengths, 8, torch.Generator().manual_seed(2))
    assert batches != again


# --- What is trained


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A function that runs a few steps of the toy and gives the model before and after each stage."""
    monkeypatch = pytest.MonkeyPatch()

    def run(**changed):
        seen, learn = [], main.learn

        def spy(cfg, run, net, rows, loss_of, steps, peak, phase):
            before = {name: p.detach().clone() for name, p in net.named_parameters()}
            optimizer = learn(cfg, run, net, rows, loss_of, steps, peak, phase)
            seen.append((phase, net, before, optimizer))
            after[phase] = {name: p.detach().clone() for name, p in net.named_parameters()}
            return optimizer

        after = {}
        monkeypatch.setattr(main, "learn", spy)
        given = {"steps": 4, "projector_steps": 2, "text_steps": 1, "count": 40, "eval_rows": 8, "batch": 4}
        cfg = dataclasses.replace(main.Config.toy(), **(given | changed))
        folder = tmp_path_factory.mktemp("run") / "run"
        execute(INFO, cfg, folder, toy=True)
        monkeypatch.setattr(main, "learn", learn)
        return seen, after, folder

    yield run
    monkeypatch.undo()


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_each_stage_trains_its_parameters_and_no_others(short, tune, capsys):
    """Named parameters get gradients and change, the rest stay bit-equal, and no optimizer holds them."""
    seen, after, _ = short(tune=tune)
    printed = capsys.readouterr().out
    (_, language, *_), (first, net, before, optimizer), (second, _, middle, last) = seen
    assert (first, second) == ("projector", main.MAIN)
    changed = {name for name, value in after["projector"].items() if not torch.equal(value, before[name])}
    assert changed == {f"projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in net.named_parameters() if name.startswith("projector.")}
    assert "trained in 2 steps: projector (4 tensors" in " ".join(printed.split())
    changed = {name for name, value in after[main.MAIN].items() if not torch.equal(value, middle[name])}
    held = {id(p) for group in last.param_groups for p in group["params"]}
    named = {name for name, p in net.named_parameters() if id(p) in held}
    assert changed <= named
    assert not any(name.startswith("encoder.") for name in named)
    if tune == "full":
        assert {name for name in named if name.startswith("language.")} == {
            f"language.{name}" for name, _ in language.named_parameters()
        }
    else:
        assert any(".lora_" in name for name in named)
        assert all(".lora_" in name or name.startswith("projector.") for name in named)


@pytest.mark.usefixtures("no_pictures")
def test_a_projector_is_saved_alone_and_begun_with(short, tmp_path):
    _, after, folder = short()
    seen, _, _ = short(projector=folder / "projector.safetensors")
    for name, value in after[main.MAIN].items():
        if name.startswith("projector."):
            assert torch.equal(seen[1][2][name], value), name
    other = model.Projector(5, 7)
    with pytest.raises(UserError, match=r"projector\.safetensors has shape .* for linear_1\.weight"):
        files.read_projector(other, folder / "projector.safetensors")


def test_no_gradient_reaches_a_frozen_part():
    net = tiny()
    net.requires_grad_(False)
    net.projector.requires_grad_(True)
    tokens = torch.tensor([prompt(5, "i", 6, 7)])
    targets = torch.full_like(tokens, -100)
    targets[0, -2] = 7
    states = net(tokens, pictures(1), hidden=True)
    model.answer_loss(net.language, states, targets).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.projector.parameters())
    assert all(p.grad is None for part in (net.encoder, net.language) for p in part.parameters())


# --- What is learned


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The toy with two questions and fewer steps."""
    folder = tmp_path_factory.mktemp("llava") / "run"
    cfg = dataclasses.replace(
        main.Config.toy(), kinds="left,right", steps=110, projector_steps=60, text_steps=60, eval_rows=120
    )
    return execute(INFO, cfg, folder, toy=True), folder


def test_it_looks_at_the_image(small_run):
    """Far above the blind answer, which a gray image and another one give."""
    summary, _ = small_run
    found = summary["metrics"]
    assert min(found["left"], found["right"]) >= 0.6
    assert found["without_image"] <= 0.2
    assert summary["checks"]["with_another_image"]["value"] <= 0.25
    assert summary["checks"]["right_image_over_another"]["value"] > 5


def test_the_pictures_are_there(small_run):
    _, folder = small_run
    for name in ("attention.png", "answers.png", "confusion.png", "training_curves.png", "pictures/0.png"):
        assert (folder / name).stat().st_size > 100, name


def test_memory_is_predicted_with_the_encoder_in_it(small_run):
    summary, _ = small_run
    rows = {row["name"]: row for row in summary["memory"]}
    assert set(rows) == {
        "encoder", "projector", "language model", "gradients", "optimizer states", "activations"
    }  # fmt: skip
    for name in ("encoder", "projector", "language model", "gradients", "optimizer states"):
        assert rows[name]["predicted"] == rows[name]["measured"], name
    assert abs(rows["activations"]["predicted"] / rows["activations"]["measured"] - 1) < 0.1


def test_generate_answers_about_a_file(small_run, capsys):
    """`generate --image`: the answers of the run to questions about pictures of its test split."""
    from finetune.cli import main as command

    _, folder = small_run
    cfg = dataclasses.replace(main.Config.toy(), kinds="left,right")
    digits = sight.splits(cfg)["test"].digits
    right = 0
    for number in range(3):
        words = ["generate", "--model", str(folder), "--image", str(folder / f"pictures/{number}.png"), "--json"]
        for side, kind in ((0, "left"), (1, "right")):
            assert command([*words, "--prompt", f"Which digit is on the {kind}?", "--threads", "1"]) == 0
            said = json.loads(capsys.readouterr().out)[0]["text"]
            right += said == main.pictures.in_words(int(digits[number, side]))
    assert right >= 4, right
    wanted = command([*words, "--prompt", "<image> and <image>", "--threads", "1"])
    assert wanted == 2
    assert "the prompt names 2 images (<image>), 1 are given with --image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--adapter", "a"], "--adapter does not go with --image"),
        (["--top-k", "3"], "--top-k does not go with --image"),
        ([], "which model? give --model"),
    ],
)
def test_options_that_do_not_go_with_images(words, says, capsys):
    from finetune.cli import main as command

    assert command(["generate", "--image", "a.png", "--prompt", "left?", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_toy_reaches_its_targets(seed, tmp_path):
    summary = execute(INFO, dataclasses.replace(main.Config.toy(), seed=seed), tmp_path / "run", toy=True)
    assert summary["passed"], summary["metrics"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"kinds": "left,up"}, "'up' is no question: they are left, right, sum, larger"),
        ({"encoder": "mnist"}, "--encoder mnist has learned mnist, not digits: take digits"),
        ({"text_steps": 3, "language_model": "smollm2"}, "--text-steps is for --language-model scratch"),
        ({"data": "rows.jsonl"}, "scratch knows the built-in questions only"),
        ({"max_length": 12}, "of which an image takes 4: --max-length"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_one_line(changed, says, tmp_path):
    given = {"text_steps": 0, "count": 10} | changed
    with pytest.raises(UserError, match=says):
        execute(INFO, dataclasses.replace(main.Config.toy(), **given), tmp_path / "r")
