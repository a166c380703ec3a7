"""BLIP-2: a Q-Former between a frozen image encoder and a frozen language model (Li et al. 2023, arXiv:2301.12597).

    first stage    the queries learn to take from the image what a text needs: contrast + match + text
    second stage   the queries, projected, stand before the tokens of a frozen language model, which writes the caption

Reads top to bottom: settings, the run, the two loops, what is measured.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune import memory, ops, optim
from finetune.data.packing import batch_indices
from finetune.lm.io import save
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.run import Run
from finetune.vision import save as vision_save

from . import captions, convert, cost, pairs, plots, retrieval
from .captions import Language
from .losses import prefix_loss, similarities, stage1_losses
from .model import QFormerConfig, Stage1, Stage2, without_text
from .pairs import World
from .trained import Trained, opened

RANKED = 128  # pairs among which is retrieved
JUDGED = 300  # held-out images that get a caption
MATCH_BASELINE = 0.6365  # nats: answering "no" with the probability 2/3 of negatives


@dataclass
class Config(config.Config):
    steps: int = 250  # of the first stage, for each data set; 0 trains nothing, the second stage neither
    checkpoint_every: int = 100
    # emoji and their names, digits (pictures of two, with captions), or both; emoji need a color font
    pictures: Literal["emoji", "digits", "emoji,digits"] = "emoji,digits"
    data: Path | None = None  # your own instead: rows with an image and a caption as the answer (JSONL, JSON)
    count: int = bounded(8000, at_least=100, at_most=1 << 20)  # pictures of digits to train on
    # --- Models
    # auto: made here, of emoji by contrast, of digits by classification; or a folder of CLIP, SigLIP or BLIP-2
    encoder: str = "auto"
    layer: int = bounded(-1, at_least=-1000, at_most=1000)  # of the encoder, whose states are the features
    # the sines of a patch's row and column, times this, are added to its state, which hardly says where it is
    places: float = bounded(1.0, at_least=0)
    # of the second stage: a model folder, a .gguf file, smollm2, a hub id, or scratch: a small one, trained on text
    language_model: str = "smollm2"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the language model
    language_steps: int = bounded(300, at_least=0, at_most=10**9)  # scratch: of its training
    # --- Q-Former
    dim: int = bounded(96, at_least=8, at_most=1 << 14)
    layers: int = bounded(4, at_least=1, at_most=1 << 10)
    heads: int = bounded(4, at_least=1, at_most=1 << 10)
    queries: int = bounded(8, at_least=1, at_most=1 << 12)
    every: int = bounded(2, at_least=1, at_most=1 << 10)  # layers 0, every, 2 · every, … look at the image
    projection: int = bounded(64, at_least=1, at_most=1 << 14)  # dimensions in which images and texts are compared
    # --- First stage
    batch: int = bounded(64, at_least=2, at_most=1 << 16)
    lr: float = bounded(2e-3, at_least=0)  # peak learning rate of both stages; a cosine falls to a tenth
    warmup: int = bounded(20, at_least=0, at_most=10**9)  # steps until the peak
    weight_decay: float = bounded(0.05, at_least=0)  # AdamW's, on matrices only
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    smoothing: float = bounded(0.1, at_least=0, below=1)  # of the labels of contrast and text
    # share of the steps after which negatives are drawn by similarity; before, uniformly
    hard_after: float = bounded(0.5, at_least=0, at_most=1)
    # --- Second stage (digits, or a file of rows)
    stage2_steps: int = bounded(200, at_least=0, at_most=10**9)
    stage2_batch: int = bounded(16, at_least=1, at_most=1 << 16)
    prompt: str = "A photo of"  # text between the image's vectors and the caption
    # --- Controls
    stage1: bool = True  # false: the second stage begins with a new Q-Former
    shuffle_images: bool = False  # every caption gets the image of another, so there is nothing to learn

    @classmethod
    def toy(cls) -> "Config":
        return cls(
            pictures="digits", steps=200, dim=64, layers=2, every=1, lr=3e-3, stage2_steps=150, stage2_batch=64,
            language_model="scratch", language_steps=200, threads=1,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.steps:
            self.stage2_steps = 0


def main(cfg: Config, run: Run) -> dict[str, Any]:
    plots.masks(run)
    for name in ["own"] if cfg.data else cfg.pictures.split(","):
        world = pairs.world(cfg, name, lambda step, loss: heard(run, step, loss))
        run.print(f"{name}: {len(world.train):,} images to train on, {len(world.test)} held out; "
                  f"{world.train.features.shape[1]} features of each, by a frozen encoder")  # fmt: skip
        model = first_stage(cfg, run, world)
        judge_first(cfg, run, world, model)
        if name != "emoji":
            second_stage(cfg, run, world, model)
    return {}


# --- The two stages


def first_stage(cfg: Config, run: Run, world: World) -> Stage1:
    """The Q-Former, trained by contrast, match and text on features that were computed once."""
    run.seed("first", world.name)
    model = Stage1(shape(cfg, world))
    optimizer = optim.AdamW(optim.decay_groups(model.parameters(), cfg.weight_decay), lr=cfg.lr)
    say_trained(run, "first stage", model)
    train, state = world.train, {"model": model, "optimizer": optimizer}
    for step in run.steps(cfg.steps, state, phase=f"{world.name}_1"):
        g = run.generator("first", world.name, step)
        rows = torch.tensor(
            batch_indices(len(train), min(cfg.batch, len(train)), step, lambda epoch: run.generator("epoch", epoch))
        )
        hard = step >= cfg.hard_after * cfg.steps
        losses = stage1_losses(model, train.features[rows], train.texts[rows], world.decode, hard, g, cfg.smoothing)
        losses.total.backward()
        norm = update(cfg, model, optimizer, step, cfg.steps)
        run.log(step, itc=losses.itc, itm=losses.itm, itg=losses.itg, match_accuracy=losses.match_accuracy,
                temperature=model.temperature, grad_norm=norm)  # fmt: skip
    model.eval()
    place = run.dir / "model" / world.name
    convert.save(model, place / "qformer")
    save.tokenizer(world.tokenizer, place / "qformer")
    vision_save.vit(world.encoder, place / "encoder")
    return model


def second_stage(cfg: Config, run: Run, world: World, first: Stage1) -> None:
    """The Q-Former's queries become the prefix of a frozen language model. Trained: the Q-Former and a projection."""
    said = frozen_language(cfg, run, world)
    before = said.digest()
    run.seed("second", world.name)
    model = Stage2(replace(shape(cfg, world), vocab_size=0), said.model.config.dim, captions.width(said.model))
    if cfg.stage1:
        model.qformer = without_text(first.qformer)
    optimizer = optim.AdamW(optim.decay_groups(model.parameters(), cfg.weight_decay), lr=cfg.lr)
    say_trained(run, "second stage", model)
    tokens, targets = said.rows(world.train.captions)
    examples = world.test[: plots.EXAMPLES]
    start = captions.write(model, said, examples.features)
    for step in run.steps(cfg.stage2_steps, {"model": model, "optimizer": optimizer}, phase=f"{world.name}_2"):
        rows = torch.tensor(
            batch_indices(len(tokens), min(cfg.stage2_batch, len(tokens)), step, lambda e: run.generator("epoch", e))
        )
        loss = prefix_loss(model, said.model, world.train.features[rows], tokens[rows], targets[rows])
        loss.backward()
        norm = update(cfg, model, optimizer, step, cfg.stage2_steps)
        run.log(step, caption_loss=loss, grad_norm=norm)
    model.eval()
    convert.save(model, run.dir / "model" / world.name / "captions")
    run.check("language_model_unchanged", float(said.digest() == before), at_least=1)
    judge_second(cfg, run, world, model, said, start)
    if cfg.stage2_steps:
        features, ids, wanted = (x[: cfg.stage2_batch].clone() for x in (world.train.features, tokens, targets))
        run.record_memory(memory_rows(cfg, world, model, said, optimizer, (features, ids, wanted)))


def update(cfg: Config, model: nn.Module, optimizer: optim.AdamW, step: int, steps: int) -> float:
    """A step of the optimizer; the norm of the gradient."""
    norm = ops.clip_grad_norm_([p.grad for p in model.parameters() if p.grad is not None], cfg.clip)
    optimizer.step(lr=optim.cosine(step, steps, cfg.warmup, cfg.lr, cfg.lr / 10))
    optimizer.zero_grad()
    return float(norm)


# --- What is measured


def judge_first(cfg: Config, run: Run, world: World, model: Stage1) -> None:
    """Retrieval among 128 training pairs, which measures memory, and among 128 held-out ones; matching; zero-shot."""
    name, strict = world.name, judged(cfg, world)
    rows = []
    for part, shown in (("training", world.train[:RANKED]), ("held out", world.test[:RANKED])):
        image, text = retrieval.vectors(model, shown)
        sim, group = similarities(image, text), shown.texts.group
        again = retrieval.reranked(model, shown, sim)
        found = {
            "image → text R@1": retrieval.recall(sim, group, 1),
            "R@5": retrieval.recall(sim, group, 5),
            "text → image R@1": retrieval.recall(sim.mT, group, 1),
            "R@5 ": retrieval.recall(sim.mT, group, 5),
            "R@1 ranked by ITM": retrieval.recall(again, group, 1),
        }
        rows.append({"pairs": f"{len(shown)} {part}", **{key: f"{value:.3f}" for key, value in found.items()}})
        kind = part.replace(" ", "_")
        for key, value in zip(("r1", "r5", "text_r1", "text_r5", "r1_by_itm"), found.values(), strict=True):
            run.check(f"{name}_{kind}_{key}", value)
        plots.retrieved(run, f"retrieved_{name}_{kind}.png", shown, sim)
    run.table(
        f"{name}: retrieval among {RANKED} pairs, of which chance finds {1 / RANKED:.3f} and {5 / RANKED:.3f}", rows
    )
    loss, accuracy = retrieval.match_loss(model, world.train[:RANKED], run.generator("match"))
    if name == "emoji":
        run.result(
            "train_r1", run.checks["emoji_training_r1"]["value"], baseline=1 / RANKED, target=0.6 if strict else None
        )
        held = run.checks["emoji_held_out_r5"]["value"]
        run.result("held_out_r5", held, baseline=5 / RANKED, target=0.2 if strict else None)
        words = retrieval.zero_shot(model, world)
        goal = 3 * words["constant_macro"]
        run.result("zero_shot", words["macro"], baseline=words["constant_macro"], target=goal if strict else None)
        run.print(f"zero-shot over {len(retrieval.WORDS)} words, {words['images']:.0f} held-out images: macro "
                  f"{words['macro']:.3f} (one word for all: {words['constant_macro']:.3f}), micro {words['micro']:.3f} "
                  f"(the most frequent word: {words['constant_micro']:.3f})")  # fmt: skip
        for key in ("micro", "constant_micro"):
            run.check(f"zero_shot_{key}", words[key])
    run.check(f"{name}_itm_loss", loss)
    worst = max(row["value"] for key, row in run.checks.items() if key.endswith("_itm_loss"))
    run.result("itm_loss", worst, baseline=MATCH_BASELINE, target=0.5 if strict else None, higher=False)
    run.check(f"{name}_match_accuracy", accuracy)
    plots.attention(run, f"attention_{name}.png", model, world.test[: plots.EXAMPLES])


def judge_second(cfg: Config, run: Run, world: World, model: Stage2, said: Language, start: list[str]) -> None:
    """Captions of held-out images, free-running: with their image, with another's, and with a gray one."""
    held = world.test[:JUDGED]
    other = held.features.roll(1, 0)  # each image's caption from another image
    gray = world.gray.expand_as(held.features)
    written = {
        key: captions.write(model, said, x) for key, x in (("", held.features), ("_shuffled", other), ("_gray", gray))
    }
    examples = [{"image": f"held out {i}", "caption": text, "before": old, "after": new}
                for i, (text, old, new) in enumerate(zip(held.captions, start, written[""], strict=False))]  # fmt: skip
    run.table(f"{world.name}: captions of held-out images", examples[:8])
    plots.captioned(run, f"captions_{world.name}.png", held[: len(start)], start, written[""])
    run.check(f"{world.name}_caption_loss", captions.caption_loss(model, said, held.features, held.captions))
    if world.name != "digits":
        exact = sum(a == b for a, b in zip(written[""], held.captions, strict=True)) / len(held)
        run.result("exact_captions", exact)
        return
    blind = captions.digits_right([captions.constant(world.train.captions)] * len(held), held.captions)
    found = {key: captions.digits_right(texts, held.captions) for key, texts in written.items()}
    strict = judged(cfg, world)
    worse = min(found[""][:2])
    run.result("digit_accuracy", worse, baseline=max(blind[:2]), target=0.85 if strict else None)
    run.result("both_digits", found[""][2], baseline=blind[2])
    for key in ("_shuffled", "_gray"):
        run.check(f"digit_accuracy{key}", max(found[key][:2]), **({"at_most": 0.25} if strict else {}))
    plots.confusion(run, "confusion.png", written[""], held.captions)


# --- Parts


def shape(cfg: Config, world: World) -> QFormerConfig:
    return QFormerConfig(
        world.train.features.shape[-1], cfg.dim, cfg.layers, cfg.heads, cfg.queries, cfg.every,
        vocab_size=world.tokenizer.vocab_size, max_length=32, projection=cfg.projection,
    )  # fmt: skip


def judged(cfg: Config, world: World) -> bool:
    """Whether the targets apply: to the data and encoders that are made here, and not to the control."""
    return world.name in pairs.RECIPES and cfg.encoder == "auto" and not cfg.shuffle_images


def frozen_language(cfg: Config, run: Run, world: World) -> Language:
    """The language model that writes; `scratch` is trained on text first."""
    if cfg.language_model != "scratch":
        return captions.language(cfg.language_model, getattr(torch, cfg.dtype), cfg.prompt)
    run.seed("language")
    model = captions.small_model(world.tokenizer)
    captions.train_small(run, model, world.tokenizer, world.train.captions, cfg.queries, cfg.language_steps)
    save.model(model, run.dir / "model" / world.name / "language", world.tokenizer)
    return captions.small_language(model, world.tokenizer)


def seeing(folder: Path, cfg: Config, data_set: str | None = None) -> Trained:
    """The trained models of a finished run, for `python -m finetune caption`."""
    return opened(folder, cfg, data_set)


def memory_rows(
    cfg: Config, world: World, model: Stage2, said: Language, optimizer: optim.AdamW, one: tuple[Tensor, Tensor, Tensor]
) -> list[dict[str, Any]]:
    """Bytes of a step of the second stage, by formula and as measured, those of the encoder included."""
    rows, features, _ = one[0].shape
    tokens = cfg.queries + one[1].shape[1] - 1
    frozen = world.encoder.config, said.model.config
    dtype = str(said.model.embed.weight.dtype).removeprefix("torch.")
    predicted = cost.second_stage(model.qformer.config, *frozen, rows, features, tokens, dtype)
    whole = nn.ModuleList([model, said.model])
    measured = memory.measure(whole, optimizer, lambda: prefix_loss(model, said.model, *one))
    parts = (("encoder", world.encoder), ("language model", said.model), ("Q-Former and projection", model))
    measured |= {name: sum(p.nbytes for p in part.parameters()) for name, part in parts}
    return memory.table(predicted, measured)


def heard(run: Run, step: int, loss: float) -> None:
    """Where the encoder is, which is trained once and kept in the cache."""
    if step % 100 == 0:
        run.print(f"the encoder is trained, once: step {step}, loss {loss:.3f}")


def say_trained(run: Run, what: str, model: nn.Module) -> None:
    """One line: which parameters are trained."""
    parts: dict[str, int] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = name.split(".")[0]
            parts[key] = parts.get(key, 0) + p.numel()
    listed = ", ".join(f"{name} {count:,}" for name, count in parts.items())
    run.print(f"{what}: {sum(parts.values()):,} parameters are trained ({listed})")
