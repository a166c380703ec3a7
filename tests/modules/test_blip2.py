"""The blip2 module: its masks, the Q-Former next to transformers', the losses, the prefix, what a run learns."""

import dataclasses
import json
import math

import pytest
import torch
from resumed import resumes_to_the_same_bytes
from seeds import OTHERS
from summaries import numbers

from finetune.data.toy_directory import small_llama
from finetune.errors import UserError
from finetune.lm.llama import LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import registry
from finetune.runs.run import execute
from finetune.vision.vit import ViT, ViTConfig

INFO = registry.find("blip2")
main = registry.load(INFO)
model, losses, convert, captions, retrieval, pairs = (
    registry.part("blip2", name) for name in ("model", "losses", "convert", "captions", "retrieval", "pairs")
)
LENGTHS = torch.tensor([7, 5, 3])


def shape(**changes):
    given = {"image_dim": 24, "dim": 32, "layers": 4, "heads": 4, "queries": 5, "vocab_size": 50, "max_length": 20}
    return model.QFormerConfig(**given | {"projection": 16} | changes)


def awake(kind, *given, deviation=0.2):
    """A model whose weights are all random, norms around 1."""
    torch.manual_seed(0)
    net = kind(*given)
    for name, p in net.named_parameters():
        p.data.normal_(0, deviation)
        if "norm.weight" in name:
            p.data.add_(1)
    if kind is model.Stage1:
        net.temperature.data.fill_(0.07)
    return net.eval()


def inputs(rows=3, tokens=7, image=9):
    torch.manual_seed(1)
    return torch.randn(rows, image, 24), torch.randint(0, 50, (rows, tokens)), LENGTHS[:rows]


# --- Masks


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("itc", ["QQ...", "QQ...", "..TTT", "..TTT", "..TTT"]),
        ("itm", ["QQTTT", "QQTTT", "QQTTT", "QQTTT", "QQTTT"]),
        ("itg", ["QQ...", "QQ...", "QQT..", "QQTT.", "QQTTT"]),
    ],
)
def test_masks_are_the_papers_figure_2(kind, table):
    """Two queries and three tokens; row sees column. ITG is LAVIS's: queries in the cache, tokens causal."""
    want = torch.tensor([[letter != "." for letter in row] for row in table])
    assert torch.equal(model.visible(kind, 2, 3)[0], want)
    short = model.visible(kind, 2, 3, torch.tensor([3, 1]))
    assert torch.equal(short[0], want)
    assert torch.equal(short[1], want & torch.tensor([True, True, True, False, False]))


def test_an_unknown_mask_is_refused():
    with pytest.raises(UserError, match="itc, itm, itg"):
        model.visible("all", 2, 3)


@torch.no_grad()
def seen(kind, part, changed):
    """Which states of the queries (0) or the text (1) change, bit by bit, if the token at place `changed` does."""
    qformer = awake(model.Stage1, shape()).qformer
    image, tokens, _ = inputs()
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 50
    full = torch.tensor([7, 7, 7])
    a, b = (qformer(image, each, full, kind)[part] for each in (tokens, other))
    return (a != b).any(-1)  # (B, Q or T)


def test_queries_see_the_text_in_matching_only():
    for kind, there in (("itc", False), ("itm", True), ("itg", False)):
        assert (seen(kind, 0, 2) == there).all(), kind


def test_a_token_sees_later_ones_in_matching_and_contrast_only():
    for kind, there in (("itc", True), ("itm", True), ("itg", False)):
        changed = seen(kind, 1, 4)
        assert (changed[:, :4] == there).all(), kind
        assert changed[:, 4:].all(), kind


@torch.no_grad()
def test_text_sees_the_image_through_the_queries_only():
    """Another image changes the text's states where the mask shows it the queries."""
    qformer = awake(model.Stage1, shape()).qformer
    image, tokens, lengths = inputs()
    for kind, there in (("itc", False), ("itm", True), ("itg", True)):
        a, b = (qformer(x, tokens, lengths, kind)[1] for x in (image, image.flip(0) + 1))
        assert (a != b).any() == there, kind


@torch.no_grad()
def test_contrast_in_one_pass_equals_queries_and_text_apart():
    qformer = awake(model.Stage1, shape()).qformer
    image, tokens, lengths = inputs()
    together = qformer(image, tokens, lengths, "itc")
    assert torch.allclose(together[0], qformer(image)[0], atol=1e-5)
    apart = qformer(None, tokens, lengths)[1]
    for row, length in enumerate(lengths):
        assert torch.allclose(together[1][row, :length], apart[row, :length], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["itc", "itm", "itg"])
def test_a_row_alone_equals_the_row_in_a_padded_batch(kind):
    qformer = awake(model.Stage1, shape()).qformer
    image, tokens, lengths = inputs()
    queries, text = qformer(image, tokens, lengths, kind)
    for row, length in enumerate(lengths.tolist()):
        alone = qformer(image[row : row + 1], tokens[row : row + 1, :length], None, kind)
        assert torch.allclose(queries[row], alone[0][0], atol=1e-5)
        assert torch.allclose(text[row, :length], alone[1][0], atol=1e-5)


def test_every_second_layer_looks_at_the_image():
    net = model.QFormer(shape(every=2))
    assert [block.cross is not None for block in net.blocks] == [True, False, True, False]
    image, *_ = inputs()
    looks = net.looks(image)
    assert [tuple(each.shape) for each in looks] == [(3, 4, 5, 9)] * 2
    assert torch.allclose(torch.stack(looks).sum(-1), torch.ones(()), atol=1e-5)


def test_looks_are_the_weights_that_the_forward_pass_uses():
    """Values of one head that say the place alone give the weights back."""
    torch.manual_seed(0)
    net = model.QFormer(shape(layers=1, heads=1, dim=24, vocab_size=0))
    image, *_ = inputs()
    block = net.blocks[0]
    with torch.no_grad():
        x = block.attn(*[net.norm(net.queries.expand(3, -1, -1))] * 2)
        q, k, v = (
            part(of)[:, :, None]
            for part, of in zip((block.cross.q, block.cross.k, block.cross.v), (x, image, image), strict=True)
        )
        from finetune import ops

        want = ops.attention(q, k, v, causal=False)[:, :, 0]
        assert torch.allclose(net.looks(image)[0][:, 0] @ block.cross.v(image), want, atol=1e-5)


def test_inputs_that_cannot_be_are_refused():
    net = model.QFormer(shape(vocab_size=0))
    image, tokens, _ = inputs()
    for given in ((None, None), (image, tokens)):
        with pytest.raises(UserError):
            net(*given)
    with pytest.raises(UserError, match="maximum of 20"):
        model.QFormer(shape())(None, torch.zeros(1, 21, dtype=torch.int64))
    for changes in ({"dim": 30}, {"queries": 0}, {"every": 0}):
        with pytest.raises(UserError):
            shape(**changes)


# --- Losses


def test_contrast_is_the_papers_formula():
    """Maximum over the queries, both directions, smoothed labels; written out in float64."""
    torch.manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(4, 3, 8, dtype=torch.float64), dim=-1)
    text = torch.nn.functional.normalize(torch.randn(4, 8, dtype=torch.float64), dim=-1)
    sim = losses.similarities(image, text)
    want = torch.tensor([[max(float(q @ t) for q in rows) for t in text] for rows in image], dtype=torch.float64)
    assert torch.allclose(sim, want)
    total = 0.0
    for scores in (want / 0.1, want.T / 0.1):
        for i, row in enumerate(scores):
            p = row.exp() / row.exp().sum()
            total -= sum((0.9 * (i == j) + 0.1 / 4) * math.log(p[j]) for j in range(4)) / 8
    found = losses.contrast(sim, torch.arange(4), torch.tensor(0.1, dtype=torch.float64))
    assert found.item() == pytest.approx(total, rel=1e-9)
    assert losses.contrast(sim, torch.arange(4), torch.tensor(0.1), 0.0).item() == pytest.approx(
        (torch.nn.functional.cross_entropy(sim / 0.1, torch.arange(4))
         + torch.nn.functional.cross_entropy(sim.T / 0.1, torch.arange(4))).item() / 2, rel=1e-5)  # fmt: skip


def test_equal_captions_are_positives_of_each_other():
    sim, group = torch.eye(4), torch.tensor([0, 1, 0, 2])
    sim[0, 2] = sim[2, 0] = 1.0
    low = losses.contrast(sim, group, torch.tensor(0.01), 0.0)
    assert low.item() == pytest.approx(0.5 * math.log(2), abs=1e-3)  # two of four rows are shared by two
    drawn = torch.stack([losses.negatives(sim, group, torch.tensor(0.07), True, torch.Generator().manual_seed(i))
                         for i in range(50)])  # fmt: skip
    assert (group[drawn] != group).all()


def test_negatives_are_uniform_first_and_hard_after():
    sim, group = torch.zeros(3, 3), torch.arange(3)
    sim[0, 1] = 1.0

    def share(hard):
        g = torch.Generator().manual_seed(0)
        return sum(int(losses.negatives(sim, group, torch.tensor(0.2), hard, g)[0] == 1) for _ in range(400)) / 400

    assert share(False) == pytest.approx(0.5, abs=0.1)
    weights = (sim[0] / 0.2).softmax(0)
    assert share(True) == pytest.approx((weights[1] / weights[1:].sum()).item(), abs=0.05)


def texts(rows=3):
    _, tokens, lengths = inputs(rows)
    return losses.Texts(tokens, lengths, torch.arange(rows))


def test_the_text_loss_predicts_each_next_token_once():
    tokens, targets = losses.decoded(texts(), 49)
    assert (tokens[:, 0] == 49).all()
    for row, length in enumerate(LENGTHS.tolist()):
        assert torch.equal(tokens[row, 1:], texts().tokens[row, 1:])
        assert torch.equal(targets[row, : length - 1], texts().tokens[row, 1:length])
        assert (targets[row, length - 1 :] == losses.IGNORED).all()


def test_every_loss_reaches_what_it_should():
    """Contrast teaches both projections and the temperature, matching its head, text the head that writes."""
    net = awake(model.Stage1, shape())
    image, *_ = inputs()
    found = losses.stage1_losses(net, image, texts(), 49, True, torch.Generator().manual_seed(0))
    named = dict(net.named_parameters())
    reached = {}
    for name in ("itc", "itm", "itg"):
        grads = torch.autograd.grad(getattr(found, name), list(named.values()), allow_unused=True, retain_graph=True)
        reached[name] = {key for key, g in zip(named, grads, strict=True) if g is not None and g.abs().max() > 0}
    heads = {"itc": "image_projection.weight", "itm": "match.weight", "itg": "write.weight"}
    for name, head in heads.items():
        assert {own for own in heads.values() if own in reached[name]} == {head}
    assert {"temperature", "text_projection.weight"} <= reached["itc"]
    assert "temperature" not in reached["itm"] | reached["itg"]
    assert all("qformer.queries" in each for each in reached.values())
    assert set(named) == set().union(*reached.values())


def test_a_batch_of_one_caption_is_no_error():
    net = awake(model.Stage1, shape())
    image, *_ = inputs()
    same = dataclasses.replace(texts(), group=torch.zeros(3, dtype=torch.int64))
    assert losses.stage1_losses(net, image, same, 49, True, torch.Generator()).total.isfinite()


# --- The prefix of a frozen language model


TOKENIZER = Tokenizer.train([" three and seven", " one and nine"], 300)


def said(prompt=(5, 6)):
    torch.manual_seed(2)
    shape = LlamaConfig(TOKENIZER.vocab_size, 40, 2, 4, 2, 64, max_length=40)
    return captions.frozen(small_llama(shape), TOKENIZER, prompt)


def test_the_prefix_is_what_the_language_model_reads():
    """Logits behind the queries equal those of one long sequence of vectors; labels are shifted once."""
    language, net = said(), awake(model.Stage2, shape(vocab_size=0), 40)
    image, *_ = inputs()
    tokens, targets = language.rows(["three and seven", "one", "one and nine"])
    prefix = net(image)
    whole = torch.cat([prefix, language.model.embeddings(tokens)], 1)
    logits = language.model(torch.zeros(whole.shape[:2], dtype=torch.int64), embedded=whole)
    want = torch.nn.functional.cross_entropy(
        logits[:, prefix.shape[1] - 1 : -1].flatten(0, 1), targets.flatten(), ignore_index=losses.IGNORED
    )
    assert losses.prefix_loss(net, language.model, image, tokens, targets).item() == pytest.approx(
        want.item(), abs=1e-5
    )
    assert torch.equal(torch.where(targets == losses.IGNORED, tokens, targets), tokens)
    assert (targets[:, :2] == losses.IGNORED).all()  # the prompt
    assert (tokens[:, :2] == torch.tensor([5, 6])).all()


def test_the_language_model_gets_no_gradient_and_the_bridge_all():
    language, net = said(), awake(model.Stage2, shape(vocab_size=0), 40)
    before = language.digest()
    image, *_ = inputs()
    losses.prefix_loss(net, language.model, image, *language.rows(["one and nine"] * 3)).backward()
    assert all(p.grad is None for p in language.model.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    assert language.digest() == before
    language.model.embed.weight.data[0, 0] += 1
    assert language.digest() != before


@torch.no_grad()
@pytest.mark.parametrize("prompt", [(), (5, 6)])
def test_writing_with_a_cache_equals_writing_without(prompt):
    language, net = said(prompt), awake(model.Stage2, shape(vocab_size=0), 40)
    image, *_ = inputs()
    prefix, want = net(image), []
    for row in prefix:
        ids: list[int] = []
        while len(ids) < captions.MOST and (not ids or ids[-1] != language.end):
            x = torch.cat([row[None], language.model.embeddings(torch.tensor([[*prompt, *ids]], dtype=torch.int64))], 1)
            logits = language.model(torch.zeros(x.shape[:2], dtype=torch.int64), embedded=x)
            ids.append(int(logits[0, -1].argmax()))
        want.append(TOKENIZER.decode([i for i in ids if i != language.end], skip_special_tokens=True).strip())
    assert captions.write(net, language, image) == want


def test_the_second_stage_takes_the_first_ones_queries():
    first = awake(model.Stage1, shape())
    image, *_ = inputs()
    copy = model.without_text(first.qformer)
    assert torch.equal(copy(image)[0], first.qformer(image)[0])
    assert not any(name.startswith(("words", "places")) or "text_mlp" in name for name, _ in copy.named_parameters())


def test_repetitions_hold_the_caption_and_learn_it_alone():
    g = torch.Generator().manual_seed(0)
    tokens, targets = captions.repetitions(TOKENIZER, ["three and seven", "one"], 6, 8, g)
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        caption = [t for t in target if t not in (losses.IGNORED, TOKENIZER.eos_id)]
        assert TOKENIZER.decode(caption).strip() in ("three and seven", "one")
        assert row[6] == TOKENIZER.bos_id
        rest = iter(row[:6])
        assert all(word in rest for word in caption)  # in this order among the noise
        assert set(target[:6]) == {losses.IGNORED}


def test_digits_are_judged_place_by_place():
    wanted = ["three and seven", "one and one", "two and nine", "four and five"]
    written = ["three and seven", "one and two", "nine and two", "four"]
    assert captions.digits_right(written, wanted) == (0.5, 0.25, 0.25)
    assert captions.constant(["one and two", "one and three", "five and three"]) == "one and three"


# --- Retrieval


def test_recall_counts_equal_captions():
    sim = torch.tensor([[0.1, 0.9, 0.0], [0.2, 0.8, 0.9], [0.0, 0.1, 0.5]])
    assert retrieval.recall(sim, torch.arange(3), 1) == pytest.approx(1 / 3)
    assert retrieval.recall(sim, torch.arange(3), 2) == 1.0
    assert retrieval.recall(sim, torch.tensor([0, 0, 1]), 1) == pytest.approx(2 / 3)


def test_an_image_belongs_to_its_rarest_word():
    names = ["grinning face", "clock face", "cat", "sunface", "sun"]
    assert retrieval.first_word(names, ("clock", "cat", "face")) == [(0, 2), (1, 0), (2, 1)]


@torch.no_grad()
def test_ranking_again_keeps_the_candidates():
    net = awake(model.Stage1, shape())
    image, *_ = inputs()
    shown = pairs.Pairs([], image, ("a", "b", "c"), texts())
    sim = losses.similarities(*retrieval.vectors(net, shown))
    again = retrieval.reranked(net, shown, sim, among=2)
    assert torch.equal(again.topk(2, 1).indices.sort().values, sim.topk(2, 1).indices.sort().values)
    best = again.argmax(1)
    for row in range(3):
        kept = sim[row].topk(2).indices
        logits = net.matches(image[row].expand(2, -1, -1), texts().tokens[kept], texts().lengths[kept])
        assert best[row] == kept[(logits[:, 1] - logits[:, 0]).argmax()]


# --- Files


def encoder(**changes):
    torch.manual_seed(3)
    given = {"height": 16, "width": 16, "patch": 4, "dim": 24, "layers": 2, "heads": 4, "activation": "gelu"}
    return ViT(ViTConfig(**given | changes)).eval()


@pytest.mark.parametrize("kind", ["Stage1", "Stage2"])
def test_a_runs_folder_gives_the_same_model(kind, tmp_path):
    given = (shape(),) if kind == "Stage1" else (shape(vocab_size=0), 40)
    ours = awake(getattr(model, kind), *given)
    convert.save(ours, tmp_path)
    again = convert.load(getattr(model, kind), tmp_path)
    assert again.qformer.config == ours.qformer.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))
    (tmp_path / convert.HEADS).write_bytes(b"no")
    with pytest.raises(UserError, match=convert.HEADS):
        convert.load(getattr(model, kind), tmp_path)


def test_a_whole_folder_gives_the_same_parts(tmp_path):
    eye, first, second, language = (
        encoder(),
        awake(model.Stage1, shape()),
        awake(model.Stage2, shape(), 40),
        said().model,
    )
    convert.save_whole(eye, first, tmp_path / "first")
    convert.save_whole(eye, second, tmp_path / "second", language)
    for folder, stage, lm in (("first", first, None), ("second", second, language)):
        found = convert.read_whole(tmp_path / folder)
        for ours, theirs in ((eye, found[0]), (stage, found[1]), (lm, found[2])):
            if ours is None:
                assert theirs is None
                continue
            kept = {n: p for n, p in ours.named_parameters() if n not in convert.OWN}
            assert all(torch.equal(p, dict(theirs.named_parameters())[n]) for n, p in kept.items())


def test_what_cannot_be_saved_or_read_is_named(tmp_path):
    first = awake(model.Stage1, shape())
    for changes, name in (({"channels": 1}, "channels"), ({"pre_norm": True}, "pre_norm"), ({"width": 20}, "height")):
        with pytest.raises(UserError, match=name):
            convert.save_whole(encoder(**changes), first, tmp_path / "no")
    convert.save_whole(encoder(), awake(model.Stage2, shape(), 40), tmp_path / "g", said().model)
    config = tmp_path / "g/config.json"
    text = config.read_text()
    for old, new, said_so in (
        ('"model_type": "llama"', '"model_type": "opt"', "opt"),
        ('"hidden_act": "gelu"', '"hidden_act": "relu"', "hidden_act"),
    ):
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=said_so):
            convert.read_whole(tmp_path / "g")


# --- transformers


def theirs(text=None, **changes):
    from transformers import Blip2Config

    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    qformer = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
               "intermediate_size": 64, "max_position_embeddings": 20, "cross_attention_frequency": 2,
               "use_qformer_text_input": text is None}  # fmt: skip
    language = {"model_type": "llama", "vocab_size": 60, "hidden_size": 40, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    return Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text or language,
                       num_query_tokens=5, image_text_hidden_size=16, **changes)  # fmt: skip


def shaken(net, seed=0):
    torch.manual_seed(seed)
    for p in net.parameters():
        p.data.add_(torch.randn_like(p) * 0.15)
    return net.eval()


@pytest.mark.peer
def test_matching_and_contrast_equal_transformers(tmp_path):
    from transformers import Blip2ForImageTextRetrieval, Blip2QFormerModel

    net = shaken(Blip2ForImageTextRetrieval(theirs()))
    net.save_pretrained(tmp_path / "t")
    eye, ours, _ = convert.read_whole(tmp_path / "t")
    _, tokens, lengths = inputs()
    x, attends = torch.randn(3, 3, 16, 16), (torch.arange(7) < lengths[:, None]).long()
    with torch.no_grad():
        features = eye.norm(eye.states(x))
        want = net(x, tokens, attends, use_image_text_matching_head=True).logits_per_image
        assert (want - ours.matches(features, tokens, lengths)).abs().max() < 1e-5
        want = net(x, tokens, attends, use_image_text_matching_head=False)
        vectors = ours.image_vectors(features), ours.text_vectors(tokens, lengths)
        assert (want.logits_per_image - losses.similarities(*vectors)).abs().max() < 1e-5
        assert (want.image_embeds - vectors[0]).abs().max() < 1e-5
        convert.save_whole(eye, ours, tmp_path / "o")
        again = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "o")
        assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in net.named_parameters())
        convert.save(ours, tmp_path / "q")
        alone, info = Blip2QFormerModel.from_pretrained(tmp_path / "q", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        queries = ours.qformer.queries.expand(3, -1, -1)
        states = alone.eval()(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        assert (states - ours.qformer(features)[0]).abs().max() < 1e-5


@pytest.mark.peer
def test_captions_equal_transformers(tmp_path):
    """Logits, loss and greedy generation, and a folder of ours opens there."""
    from transformers import Blip2ForConditionalGeneration

    language = theirs().text_config.to_dict()
    net = shaken(Blip2ForConditionalGeneration(theirs(language, image_token_index=59)))
    net.save_pretrained(tmp_path / "t")
    eye, ours, lm = convert.read_whole(tmp_path / "t")
    x = torch.randn(3, 3, 16, 16)
    ids = torch.cat([torch.full((3, 5), 59), torch.randint(3, 50, (3, 6))], 1)
    labels = ids.masked_fill(ids == 59, -100)
    with torch.no_grad():
        features = eye.norm(eye.states(x))
        want = net(x, ids, labels=labels)
        embedded = torch.cat([ours(features), lm.embeddings(ids[:, 5:])], 1)
        assert (want.logits - lm(ids, embedded=embedded)).abs().max() < 1e-5
        loss = losses.prefix_loss(ours, lm, features, ids[:, 5:], ids[:, 5:].clone())
        first = torch.nn.functional.cross_entropy(want.logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten())
        assert loss.item() == pytest.approx(first.item(), abs=1e-5)
        convert.save_whole(eye, ours, tmp_path / "o", lm, image_token=59)
        again = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "o").eval()
        assert torch.equal(again(x, ids).logits, want.logits)


# --- Runs


def small(**changes):
    """A run in a second or two, which learns nothing."""
    given = {"steps": 2, "stage2_steps": 2, "language_steps": 2, "count": 100, "dim": 16, "layers": 1, "queries": 4,
             "batch": 16, "stage2_batch": 8}  # fmt: skip
    return dataclasses.replace(main.Config.toy(), **given | changes)


def run(folder, config):
    return execute(INFO, config, folder, toy=True)


def weights(folder):
    first = convert.load(model.Stage1, folder / "model/digits/qformer")
    second = convert.load(model.Stage2, folder / "model/digits/captions")
    return [*first.parameters(), *second.parameters()]


@pytest.mark.parametrize("calls", [pytest.param(2, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long), 6])
def test_an_interrupted_run_ends_with_the_same_bytes(calls, tmp_path):
    """Cut off in the first stage, in the language model's training, and in the second stage."""
    resumes_to_the_same_bytes(INFO, small(checkpoint_every=1), tmp_path, calls)
    a, b = (weights(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_no_steps_and_no_rate_change_nothing(tmp_path):
    none = run(tmp_path / "none", small(steps=0))
    run(tmp_path / "still", small(lr=0.0))
    assert none["metrics"]["digit_accuracy"] < 0.25
    a, b = (weights(tmp_path / name) for name in ("none", "still"))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_without_a_color_font_the_fix_and_the_other_data_are_named(monkeypatch, tmp_path):
    from finetune.diffusion import images

    monkeypatch.setattr(images, "FONTS", ())
    with pytest.raises(UserError, match=r"fonts-noto-color-emoji.*--pictures digits"):
        run(tmp_path / "run", small(pictures="emoji,digits"))


def rows_file(folder, count=24):
    from PIL import Image

    torch.manual_seed(0)
    lines = []
    for i in range(count):
        x = torch.randint(256, (20, 30, 3), dtype=torch.uint8)
        Image.fromarray(x.numpy()).save(folder / f"{i}.png")
        messages = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": f"noise {i}"}]
        lines.append(json.dumps({"image": f"{i}.png", "messages": messages}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def test_own_rows_are_trained_on(tmp_path):
    file = rows_file(tmp_path)
    summary = run(tmp_path / "run", small(data=file, encoder="digits"))
    assert set(summary["metrics"]) == {"itm_loss", "exact_captions"}
    assert summary["passed"] is not False  # no target is set for data that nobody knows
    train, test = pairs.own(str(file))
    assert len(train) + len(test) == 24
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], lines[3].replace('"image": "3.png"', '"images": ["3.png", "4.png"]')
                               .replace("<image>", "<image><image>"), *lines[4:]]))  # fmt: skip
    with pytest.raises(UserError, match=r"rows.jsonl, line 4: a pair has one image"):
        pairs.own(str(file))


def test_an_encoder_from_a_folder_takes_its_own_preprocessing(tmp_path):
    from finetune.vision import save

    save.vit(encoder(patch_bias=False, pre_norm=True, activation="gelu"), tmp_path / "eye")
    (tmp_path / "eye/preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16},
         "crop_size": {"height": 16, "width": 16}}))  # fmt: skip
    eye, take = pairs.encoder_of(str(tmp_path / "eye"))
    found = pairs.features_of(eye, take, [torch.zeros(3, 20, 30, dtype=torch.uint8)], -2)
    assert found.shape == (1, 17, 24)
    from finetune.data.image_files import open_image
    from finetune.vision import preprocess

    rows_file(tmp_path, 1)
    x = preprocess.load(tmp_path / "eye").batch([open_image(tmp_path / "0.png")])
    image = pairs.own_image(open_image(tmp_path / "0.png"))
    assert torch.equal(take([image]), x)


def test_held_out_emoji_are_not_trained_on():
    from pathlib import Path

    from finetune.diffusion import images
    from finetune.vision import pictures, pretrain

    if not any(Path(name).is_file() for name, _ in images.FONTS):
        pytest.skip("no color emoji font")
    train, test = pairs.emoji()
    seen, _ = pretrain.captioned(pretrain.RECIPES["contrast"], 0)
    known = {x.numpy().tobytes() for x in seen}
    assert all(x.numpy().tobytes() in known for x, _ in train)
    assert not any(x.numpy().tobytes() in known for x, _ in test)
    assert {pictures.split_of(x.numpy().tobytes()) for x, _ in test} == {"validation", "test"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip2") / "run"
    return folder, run(folder, main.Config.toy())


def reached(summary):
    found = numbers(summary)
    assert summary["passed"] is True, found
    assert found["digit_accuracy"] >= 0.85 > 0.2 > found["digit_accuracy_shuffled"], found
    assert found["itm_loss"] < 0.5
    assert found["language_model_unchanged"] == 1
    assert found["digits_held_out_r5"] >= 0.8  # of 100 captions


def test_toy_reads_digits_through_a_frozen_language_model(toy):
    reached(toy[1])


@pytest.mark.parametrize("seed", OTHERS)
def test_toy_reads_digits_on_other_seeds(seed, tmp_path):
    reached(run(tmp_path / "run", dataclasses.replace(main.Config.toy(), seed=seed)))


@pytest.mark.long
def test_shuffled_captions_teach_nothing(tmp_path):
    found = numbers(run(tmp_path / "run", dataclasses.replace(main.Config.toy(), shuffle_images=True)))
    assert found["digit_accuracy"] < 0.2
    assert found["digits_held_out_r5"] < 0.2
    assert found["itm_loss"] > 0.55


@pytest.mark.long
def test_places_tell_left_from_right(toy, tmp_path):
    """Without them the same steps read less."""
    found = run(tmp_path / "run", dataclasses.replace(main.Config.toy(), places=0.0))["metrics"]
    assert found["digit_accuracy"] < toy[1]["metrics"]["digit_accuracy"] - 0.1


def test_memory_of_the_second_stage_is_predicted(toy):
    rows = {row["name"]: row for row in toy[1]["memory"]}
    for name in ("encoder", "language model", "Q-Former and projection", "gradients", "optimizer states"):
        assert rows[name]["predicted"] == rows[name]["measured"], name
    assert rows["activations"]["predicted"] == pytest.approx(rows["activations"]["measured"], rel=0.1)


def test_a_trained_folder_describes_image_files(toy, tmp_path):
    """`python -m finetune caption RUN FILE …`, with and without texts to choose from."""
    from finetune.caption import caption
    from finetune.diffusion import images

    _, test = pairs.digits(8000, 0)
    files, wanted = [], [text for _, text in test[:40]]
    for i, (image, _) in enumerate(test[:40]):
        images.save(tmp_path / f"{i}.png", image)
        files.append(str(tmp_path / f"{i}.png"))
    found = caption(toy[0], files, threads=1)
    assert [row["image"] for row in found] == files
    assert captions.digits_right([row["caption"] for row in found], wanted)[2] > 0.8
    texts = sorted(set(wanted))
    ranked = caption(toy[0], files, texts, threads=1)
    best = [max(row["scores"], key=row["scores"].get) for row in ranked]
    assert sum(a == b for a, b in zip(best, wanted, strict=True)) / 40 > 0.4
    with pytest.raises(UserError, match="digits"):
        caption(toy[0], files, data_set="emoji")
    with pytest.raises(UserError, match="no such file"):
        caption(toy[0], ["missing.png"])
    with pytest.raises(UserError, match="not the folder of a run"):
        caption(tmp_path, files)
