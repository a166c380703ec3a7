"""LLaVA: a language model sees through a projector (Liu et al. 2023, arXiv:2304.08485).

    stage 1   the projector alone learns to make vectors that a frozen language model understands
    stage 2   the projector and the language model (or LoRA in it) learn together; the encoder stays frozen

    loss = − Σ_t m_t log p(x_t | image, x_<t) / Σ_t m_t        m_t = 1 for the tokens of an answer and its end, else 0

Reads top to bottom: settings, the run (parts, the two stages, evaluation), then its parts. The README explains every
metric and every choice.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune import ops, optim
from finetune.data.image_rows import PLACEHOLDER
from finetune.data.toy_directory import small_llama
from finetune.errors import UserError
from finetune.lm import template_tokens
from finetune.lm.io import load
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer, answer_text, stop_ids
from finetune.peft import bases, lora
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.run import MAIN, Run
from finetune.vision import pictures
from finetune.vision.pictures import QUESTIONS
from finetune.vision.vit import ViT

from . import cost, data, files, plots, sight
from .data import Batch, Form, Question, Row, Writer
from .model import Llava, LlavaConfig, answer_loss
from .sight import Features

CAPTION = "{} {}"  # a picture told in words, from which the small language model learns to answer
GOALS = {"left": 0.85, "right": 0.85}  # of the default run
TOY_GOALS = {"left": 0.9, "right": 0.9, "larger": 0.9, "sum": 0.85}
BLIND = 0.15  # at most so much without the image
ERRORS = 3.0  # standard errors by which the right image has to beat another one


@dataclass
class Config(config.Config):
    steps: int = 200  # of both stages
    checkpoint_every: int = 50
    # a file or folder of rows with images (JSONL or JSON, as LLaVA's): none: pictures of two digits with questions
    data: Path | None = None
    pictures: Literal["digits", "mnist"] = "digits"  # whose digits: scikit-learn's or MNIST's
    kinds: str = "left,right"  # questions about them to train on, of left, right, sum, larger
    also: str = "larger"  # questions that are evaluated and not trained; may be empty
    image_last: bool = True  # the question before the picture, so that what is seen can depend on it; else behind it
    # answers as sentences, which the language model would write anyway, and whose last words say what is asked
    sentences: bool = True
    count: int = bounded(4000, at_least=1, at_most=1 << 20)  # pictures to train on
    # --- Models
    # digits_coarse, digits, mnist, contrast_digits: made here (finetune/vision/pretrain.py); or a CLIP or SigLIP folder
    encoder: str = "digits_coarse"
    layer: int = bounded(-2, at_least=-1000, at_most=1000)  # of the encoder, whose states are the features
    # strips of the image, each one vector, the mean of its patches; 0: one vector for each patch, as LLaVA
    columns: int = bounded(2, at_least=0, at_most=1 << 10)
    # a model folder, a .gguf file, smollm2, a hub id, or scratch: a small new Llama that first learns from text
    language_model: str = "smollm2"
    template: str | None = "chatml"  # a chat template (see sft); none: the language model's own
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the language model; what is trained has float32 masters
    text_steps: int = bounded(0, at_least=0, at_most=10**9)  # scratch: steps on questions with the picture in words
    projector: Path | None = None  # weights to begin with: the projector.safetensors of another run
    # --- Stages
    # stage 1: this number of the steps trains the projector alone; none: all of them
    projector_steps: int | None = bounded(None, at_least=0, at_most=10**9)
    tune: Literal["lora", "full"] = "lora"  # stage 2: what is trained of the language model
    rank: int = bounded(8, at_least=1, at_most=1 << 16)  # LoRA
    alpha: float = bounded(16.0, above=0)  # LoRA: the update is scaled by alpha / rank
    # --- Optimizer
    lr: float = bounded(3e-3, at_least=0)  # of stage 1 and of the text: its peak; a cosine falls to a tenth
    tune_lr: float = bounded(1e-3, at_least=0)  # of stage 2
    warmup: int = bounded(10, at_least=0, at_most=10**9)  # steps until the peak
    weight_decay: float = bounded(0.0, at_least=0)  # AdamW's, on matrices only
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    # --- Batches
    batch: int = bounded(16, at_least=1, at_most=1 << 20)  # rows of a step, of similar length
    max_length: int = bounded(256, at_least=8, at_most=1 << 26)  # tokens of a row, those of its images included
    # --- Evaluation
    eval_rows: int = bounded(240, at_least=1, at_most=10**9)  # questions on unseen images
    samples: int = bounded(6, at_least=0, at_most=1 << 10)  # of them shown before and after
    shuffle_images: bool = False  # control: every question gets the image of another, so there is nothing to see

    @classmethod
    def toy(cls) -> "Config":
        return cls(
            steps=350, projector_steps=100, text_steps=300, language_model="scratch", dtype="float32", columns=0,
            kinds="left,right,larger,sum", also="", image_last=False, sentences=False, tune="full", batch=32,
            max_length=64, eval_rows=800, checkpoint_every=100, threads=1,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        sight.check(self.encoder, self.pictures if self.data is None else None)
        for kind in (*self.learned, *self.asked):
            if kind not in QUESTIONS or kind == "count":
                raise UserError(f"--kinds, --also: {kind!r} is no question: they are left, right, sum, larger")
        if self.language_model == "scratch" and self.data is not None:
            raise UserError("--language-model scratch knows the built-in questions only: give a model for --data")
        if self.text_steps and self.language_model != "scratch":
            raise UserError("--text-steps is for --language-model scratch: the others have learned from text already")

    @property
    def form(self) -> Form:
        return Form(self.image_last, self.sentences)

    @property
    def learned(self) -> list[str]:
        """The kinds of questions that are trained."""
        return [kind.strip() for kind in self.kinds.split(",")]

    @property
    def asked(self) -> list[str]:
        """Those that are evaluated."""
        return list(dict.fromkeys([*self.learned, *(kind.strip() for kind in self.also.split(",") if kind.strip())]))

    @property
    def stages(self) -> tuple[int, int]:
        """Steps of the projector alone, and of both."""
        first = self.steps if self.projector_steps is None else min(self.projector_steps, self.steps)
        return first, self.steps - first


def main(cfg: Config, run: Run) -> dict[str, Any]:
    cost.check_memory(cfg)
    encoder, preprocess, settings = sight.encoder(cfg.encoder, cfg.seed, run.print)
    split = sight.splits(cfg) if cfg.data is None else None
    tokenizer, language = language_model(cfg, run, split)
    net = assemble(cfg, run, encoder, language, tokenizer)
    writer = Writer(tokenizer, net.config.image_token, net.config.each)
    if split:
        train = data.picture_rows(split["train"], writer, cfg.learned, cfg.form)
        questions = data.picture_questions(split["test"], writer, cfg.form)[: cfg.eval_rows]
        pixels = {name: sight.of_pictures(part, preprocess) for name, part in split.items()}
    else:
        assert cfg.data is not None
        found, held_out = data.read(cfg.data, cfg.eval_rows)
        run.print(f"{len(found)} rows to train on, {len(held_out)} to evaluate on")
        train = data.tokenize(found, writer, cfg.max_length, run.print)
        questions = data.row_questions(held_out, writer)
        pixels = dict.fromkeys(("train", "test"), sight.of_files(preprocess))
    if not train or not questions:
        raise UserError(f"{cfg.data}: no row to train on, or none with a question to evaluate on")
    check_lengths(cfg, net, train, questions)
    seen, unseen = Features(net, pixels["train"]), Features(net, pixels["test"])
    train = shuffled(train, run.generator("shuffle")) if cfg.shuffle_images else train
    before = answers(net, tokenizer, questions[: cfg.samples], unseen)

    def loss_of(batch: Batch) -> Tensor:
        return seen_loss(net, batch, seen)

    # Stage 1: the projector learns which vectors make a frozen language model answer rightly.
    net.requires_grad_(False)
    net.projector.requires_grad_(True)
    first, second = cfg.stages
    optimizer = learn(cfg, run, net, train, loss_of, first, cfg.lr, "projector" if second else MAIN)
    # Stage 2: the language model learns too. The encoder stays as it is.
    if second:
        if cfg.tune == "full":
            net.language.requires_grad_(True)
        else:
            lora.apply_lora(net.language, cfg.rank, cfg.alpha, generator=run.generator("lora"))
        optimizer = learn(cfg, run, net, train, loss_of, second, cfg.tune_lr, MAIN)

    # Saved first: whatever fails below, what was trained is kept.
    if second and cfg.tune == "lora":
        lora.merge(net.language, keep=True)
    files.write(net, run.dir / "model", tokenizer, settings)
    files.write_projector(net.projector, run.dir / "projector.safetensors")
    if second and cfg.tune == "lora":
        lora.unmerge(net.language)
    evaluate(cfg, run, net, tokenizer, questions, unseen, before, split)
    if split and net.config.each % 2 == 0:
        run.check("digits_by_linear_probe", sight.probe(seen, unseen, split))
    batch = data.batch_of(train, cfg.batch, 0, lambda epoch: run.generator("memory"))
    run.record_memory(cost.rows(cfg, net, optimizer, batch, lambda: loss_of(batch)))
    return {"trained_parameters": sum(p.numel() for p in net.parameters() if p.requires_grad)}


def learn(
    cfg: Config,
    run: Run,
    model: nn.Module,
    rows: Sequence[Row],
    loss_of: Callable[[Batch], Tensor],
    steps: int,
    peak: float,
    phase: str,
) -> optim.AdamW:
    """One stage: trains the parameters of `model` that need a gradient."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), cfg.weight_decay), lr=peak)
    run.print(f"trained in {steps} steps: {described(trained)}")
    for step in run.steps(steps, {"trained": trained, "optimizer": optimizer}, phase=phase):
        batch = data.batch_of(rows, cfg.batch, step, lambda epoch: run.generator(phase, "epoch", epoch))
        loss = loss_of(batch)
        loss.backward()
        norm = ops.clip_grad_norm_([p.grad for p in trained.values() if p.grad is not None], cfg.clip)
        lr = optim.cosine(step, steps, cfg.warmup, peak, peak / 10)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        run.log(step, loss=loss, grad_norm=norm, lr=lr)
    return optimizer


def seen_loss(net: Llava, batch: Batch, seen: Features) -> Tensor:
    """The mean loss over the learned tokens of a batch; the frozen encoder sees each image once, in `seen`."""
    vectors = net.projector(seen(batch.images)) if batch.images else None
    states = net(batch.tokens, vectors=vectors, lengths=batch.lengths, hidden=True)
    return answer_loss(net.language, states, batch.targets)


def told_loss(language: Llama, batch: Batch) -> Tensor:
    """The same of text alone."""
    return answer_loss(language, language(batch.tokens, lengths=batch.lengths, hidden=True), batch.targets)


def described(trained: dict[str, nn.Parameter]) -> str:
    """`projector (4 tensors, 12,345 parameters), language …`."""
    parts: dict[str, list[int]] = {}
    for name, parameter in trained.items():
        parts.setdefault(name.split(".")[0], []).append(parameter.numel())
    return ", ".join(f"{name} ({len(of)} tensors, {sum(of):,} parameters)" for name, of in parts.items())


# --- Evaluation


def evaluate(
    cfg: Config,
    run: Run,
    net: Llava,
    tokenizer: Tokenizer,
    questions: list[Question],
    unseen: Features,
    before: list[str],
    split: dict[str, pictures.Split] | None,
) -> None:
    """Answers with the right image, with that of another question and with a gray one. A model that does not look gives
    the same each time, though its loss falls too: then the run fails."""
    run.print(f"answering {len(questions)} questions on unseen images, with three images each …")
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(0)).tolist()
    others = [replace(q, images=questions[i].images) for q, i in zip(questions, order, strict=True)]
    found = answers(net, tokenizer, questions, unseen)
    right = scores(questions, found)
    wrong = scores(questions, answers(net, tokenizer, others, unseen))
    gray = scores(questions, answers(net, tokenizer, questions, unseen.gray()))
    goals = {} if split is None or cfg.shuffle_images else TOY_GOALS if cfg.language_model == "scratch" else GOALS
    kinds = list(dict.fromkeys(q.kind for q in questions))
    blind = pictures.blind(split["train"].items, split["test"].items) if split else {}
    for kind in kinds:
        part = [s for s, q in zip(right, questions, strict=True) if q.kind == kind]
        run.result(kind or "exact_match", mean(part), baseline=blind.get(kind, mean(gray)), target=goals.get(kind))
    run.result("without_image", mean(gray), baseline=blind.get("all"), target=BLIND if goals else None, higher=False)
    run.check("with_another_image", mean(wrong))
    if cfg.steps and not cfg.shuffle_images:
        run.check("right_image_over_another", z_score(right, wrong), at_least=ERRORS)
        run.check("right_image_over_gray", z_score(right, gray), at_least=ERRORS)
    lines = [
        {"question": q.text, "image": plots.named(q), "before": old, "after": new, "wanted": q.wanted}
        for q, old, new in zip(questions, before, found, strict=False)
    ]
    if lines:
        run.table("answers to questions on unseen images", lines)
    plots.draw(run, net, questions, found, before, unseen, split["test"] if split else None)
    run.next_commands = next_commands(cfg, run, questions)


def scores(questions: Sequence[Question], found: Sequence[str]) -> list[bool]:
    return [answer.strip().lower() == q.wanted.lower() for q, answer in zip(questions, found, strict=True)]


def mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def z_score(one: Sequence[bool], other: Sequence[bool]) -> float:
    """By how many standard errors the paired difference of two accuracies is above 0."""
    apart = torch.tensor([a - b for a, b in zip(one, other, strict=True)], dtype=torch.float64)
    error = apart.std().item() / len(apart) ** 0.5 if len(apart) > 1 else 0.0
    return apart.mean().item() / error if error else 0.0


def answers(net: Llava, tokenizer: Tokenizer, questions: Sequence[Question], seen: Features) -> list[str]:
    """The greedy answers; a picture is encoded once, whatever is asked of it."""
    found: list[str] = []
    stops = stop_ids(net.language, tokenizer)
    longest = max((len(tokenizer.encode(q.wanted)) for q in questions), default=0) + 2
    for start in range(0, len(questions), 64):
        part = questions[start : start + 64]
        images = [image for q in part for image in q.images]
        with torch.no_grad():
            vectors = net.projector(seen(images)) if images else None
        new = net.generate([q.prompt for q in part], vectors, longest, stops)
        found += [answer_text(tokenizer, ids, stops) for ids in new]
    return found


def next_commands(cfg: Config, run: Run, questions: Sequence[Question]) -> list[tuple[str, str]]:
    """What one does next with the result: (what for, words of the command line)."""
    image = run.dir / "pictures" / "0.png"
    if not image.is_file():
        return []
    prompt = questions[0].text + (f" {PLACEHOLDER}" if cfg.image_last else "")
    folder, file = shlex.quote(str(run.dir)), shlex.quote(str(image))
    return [("ask about a picture", f'generate --model {folder} --image {file} --prompt "{prompt}"')]


# --- Parts


def language_model(cfg: Config, run: Run, split: dict[str, pictures.Split] | None) -> tuple[Tokenizer, Llama]:
    """The language model and its tokenizer; from scratch one that has learned to answer the questions from text."""
    if cfg.language_model == "scratch":
        assert split is not None
        return from_text(cfg, run, split["train"])
    source = bases.model_of(run, cfg.language_model)
    tokenizer = load.tokenizer(cfg.language_model)
    if cfg.template is not None:
        _, added = template_tokens.adopt(tokenizer, cfg.template)
        if added:
            raise UserError(
                f"--template {cfg.template} needs {', '.join(added)}, which the frozen model has not learned"
            )
    return tokenizer, load.llama(source, getattr(torch, cfg.dtype))


def from_text(cfg: Config, run: Run, split: pictures.Split) -> tuple[Tokenizer, Llama]:
    """A small Llama that answers questions about pictures told in words, which it learns in `text_steps`."""
    told = data.told(split, CAPTION, cfg.form)
    texts = [part["text"] for row in told for message in row for part in message["content"]]
    tokenizer = Tokenizer.train(dict.fromkeys(texts), vocab_size=512)
    run.seed("language")
    language = small_llama(small_shape(cfg, tokenizer.vocab_size + 1))  # and the image token
    writer = Writer(tokenizer, -1, 0)
    rows = [Row(ids, mask, ()) for row in told for ids, mask, _ in writer.documents(row)]
    learn(cfg, run, language, rows, lambda batch: told_loss(language, batch), cfg.text_steps, cfg.lr, "text")
    return tokenizer, language


def small_shape(cfg: Config, vocab: int) -> LlamaConfig:
    """0.5 million parameters."""
    return LlamaConfig(vocab, dim=128, layers=2, heads=4, kv_heads=4, hidden=512, max_length=max(cfg.max_length, 256))


def assemble(cfg: Config, run: Run, encoder: ViT, language: Llama, tokenizer: Tokenizer) -> Llava:
    """The three parts as one model, whose projector is new or that of --projector."""
    run.seed("projector")
    if encoder.projection is not None:  # that of CLIP's loss, which is of no use here
        encoder.projection = None
        encoder.config = replace(encoder.config, projection=0)
    token = tokenizer.backend.token_to_id(PLACEHOLDER)
    token = tokenizer.vocab_size if token is None else token  # behind the others
    net = Llava(LlavaConfig(encoder.config, language.config, token, cfg.layer, columns=cfg.columns), encoder, language)
    if cfg.projector is not None:
        files.read_projector(net.projector, cfg.projector)
    return net


def check_lengths(cfg: Config, net: Llava, rows: Sequence[Row], questions: Sequence[Question]) -> None:
    """UserError if a row or a question does not fit."""
    longest = max((len(q.prompt) for q in questions), default=0)
    for what, length in ((f"--max-length {cfg.max_length}", cfg.max_length), ("a question", longest)):
        if length > net.config.text.max_length:
            raise UserError(f"{what} ({length} tokens) exceeds the language model's {net.config.text.max_length}")
    if (needed := max(map(len, rows))) > cfg.max_length:
        raise UserError(f"a row has {needed} tokens, of which an image takes {net.config.each}: --max-length {needed}")


def shuffled(rows: list[Row], generator: torch.Generator) -> list[Row]:
    """The rows, each with the images of another: the control."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [replace(row, images=rows[i].images) for row, i in zip(rows, order, strict=True)]
