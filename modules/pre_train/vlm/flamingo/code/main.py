"""Flamingo (Alayrac et al. 2022, arXiv:2204.14198): a frozen language model learns to look, and then learns new words
from a few images in its prompt.

    1  a language model that can look back: SmolLM2, or a small one trained here to continue what it has read; frozen
    2  between frozen encoder and frozen language model, train the resampler and the gated layers on sequences
           <image> dax <end> <image> wug <end> … <image> → ?         words drawn for each sequence
    3  ask for images, classes and words that were not seen together: nothing is trained any more

Reads top to bottom: settings, the run (setup, loop), then what is measured.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune import memory, ops, optim
from finetune.errors import UserError
from finetune.lm import head
from finetune.lm.io import hub, load
from finetune.lm.io import save as save_language
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import checkpoint, config
from finetune.runs.config import bounded
from finetune.runs.metrics import MAIN
from finetune.runs.run import Run
from finetune.vision import pictures, pretrain
from finetune.vision import save as save_vision
from finetune.vision.vit import ViT, ViTConfig

from . import convert, cost, language, measure, plots
from .binding import DIGITS, POSES, Episodes, Pool, Task
from .model import Flamingo, FlamingoConfig

WORDS = 64  # nonsense words that the small language model knows


@dataclass
class Config(config.Config):
    steps: int = 350
    checkpoint_every: int = 175
    images: Literal["digits", "mnist"] = "digits"  # handwritten digits, 8×8 or 28×28, that ship in packages
    # --- language model
    # scratch: a small one, trained here on nonsense words; or smollm2, a folder, a .gguf file, a hub id
    language_model: str = "scratch"
    copy_steps: int = bounded(800, at_least=0, at_most=10**9)  # scratch: steps of its training on words alone
    width: int = bounded(64, at_least=32, at_most=4096)  # scratch: a multiple of 32
    layers: int = bounded(2, at_least=1, at_most=64)  # scratch
    freeze: bool = True  # false: the language model is trained along with the rest
    # --- what is added
    latents: int = bounded(4, at_least=1, at_most=1024)  # vectors that the resampler makes of an image
    depth: int = bounded(2, at_least=1, at_most=64)  # layers of the resampler
    every: int = bounded(1, at_least=1, at_most=64)  # a gated layer before every n-th block
    frames: int = bounded(1, at_least=1, at_most=2)  # 2: clips of two digits instead of images; their order counts
    # --- sequences
    ways: int = bounded(4, at_least=2, at_most=10)  # classes of a sequence
    shots: int = bounded(8, at_least=1, at_most=64)  # pairs of an image and its word in front of the query
    poses: int = bounded(4, at_least=1, at_most=4)  # of a digit in training, as classes of their own: mirrored, turned
    kept_out: int = bounded(3, at_least=0, at_most=8)  # digits, the last ones, that are never bound in training
    # --- training
    batch: int = bounded(32, at_least=1, at_most=1 << 16)  # sequences of a step
    lr: float = bounded(2e-3, at_least=0)  # peak learning rate; a cosine falls to a tenth
    gate_factor: float = bounded(30.0, at_least=0)  # the gates' learning rate over the others'
    warmup: int = bounded(50, at_least=0, at_most=10**9)
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    # --- evaluation
    episodes: int = bounded(400, at_least=20, at_most=10**6)  # sequences of each accuracy
    # steps of training in two other ways: with slow gates, and with a language model that knows nothing; 0: not at all
    lesson: int = bounded(160, at_least=0, at_most=10**9)
    shuffle: bool = False  # control: each word of a training sequence is drawn by itself, so that nothing is bound

    @classmethod
    def toy(cls) -> "Config":
        return cls(lesson=0, threads=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 32:
            raise UserError(f"--width {self.width} must be a multiple of 32, the width of a head")
        if self.ways > DIGITS - self.kept_out:
            raise UserError(f"--ways {self.ways}: {DIGITS - self.kept_out} digits are bound, --kept-out has the others")
        if self.frames == 2 and self.ways % 2:
            raise UserError(f"--ways {self.ways}: clips come in pairs, ab and ba: give an even number")


def main(cfg: Config, run: Run) -> dict[str, Any]:
    encoder = pretrain.pretrained(cfg.images, cfg.seed)
    model, words, tokenizer = language_model(cfg, run)
    net = flamingo(cfg, run, encoder, model, tokenizer)
    splits = {name: digits(cfg, name) for name in ("train", "test")}
    net.standardize(pretrain.inputs(splits["train"][0]))
    pools = {name: pool(net, *split) for name, split in splits.items()}
    task = Task([*range(DIGITS - cfg.kept_out)], words, cfg.ways, cfg.frames)
    frozen = checkpoint.fingerprint(model.state_dict().items())
    run.print(describe(net))
    examples = task.draw(pools["test"], 6, cfg.shots, run.generator("examples"))
    before = measure.told(net, pools["test"], examples, tokenizer)
    optimizer = bind(cfg, run, net, pools["train"], replace(task, poses=cfg.poses))

    # Saved first: whatever fails below, what was trained is kept.
    keep(net, tokenizer, run.dir / "model")
    changed = checkpoint.fingerprint(model.state_dict().items()) != frozen
    run.check("language_model_changed", changed, **({"at_most": 0} if cfg.freeze else {}))
    evaluate(cfg, run, net, pools["test"], task)
    after = measure.told(net, pools["test"], examples, tokenizer)
    run.table("sequences", measure.shown(examples, pools["test"], tokenizer, before, after))
    draw(run, net, pools["test"], examples, tokenizer)
    if cfg.lesson and cfg.freeze and cfg.language_model == "scratch":
        lesson(cfg, run, net, pools, task, tokenizer)
    if cfg.steps and cfg.freeze:
        batch = task.draw(pools["train"], cfg.batch, cfg.shots, run.generator("memory"))
        run.record_memory(memory_rows(cfg, net, optimizer, pools["train"], batch))
    return {}


# --- The algorithm


def binding_loss(net: Flamingo, pool: Pool, batch: Episodes) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) of the words that can be known, those of classes shown before, and of the ends of chunks;
    and the share of these words that is right. An image's own token is never learned."""
    tokens = batch.tokens(net.image, net.end_of_chunk)
    x = net.hidden(tokens, net.media(pool.features[batch.images]))  # (B, T, C)
    known = batch.known()
    learned = torch.stack([known, torch.ones_like(known), torch.zeros_like(known)], 2).flatten(1)  # word, end, image
    logits, wanted = net.logits(x[learned]).float(), tokens.roll(-1, 1)[learned]  # (N, V + 1), (N,)
    word = wanted != net.end_of_chunk
    return F.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted)[word].float().mean()


def bind(cfg: Config, run: Run, net: Flamingo, pool: Pool, task: Task, phase: str = MAIN) -> optim.AdamW:
    """The loop: new images, new words, new pairs of them in every sequence of every step."""
    trained, optimizer = net.trained(), gated_optimizer(net, cfg)
    for step in run.steps(cfg.steps, {"trained": trained, "optimizer": optimizer}, phase):
        batch = task.draw(pool, cfg.batch, cfg.shots, run.generator("batch", step))
        if cfg.shuffle:
            batch = batch.unbound(run.generator("shuffle", step))
        loss, right = binding_loss(net, pool, batch)
        loss.backward()
        norm = ops.clip_grad_norm_([p.grad for p in trained.values() if p.grad is not None], cfg.clip)
        lr = optim.cosine(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
        set_rates(optimizer, lr, cfg.gate_factor)
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, loss=loss, right=right, grad_norm=norm, lr=lr, **gates(net))
    return optimizer


def gated_optimizer(net: Flamingo, cfg: Config) -> optim.AdamW:
    """AdamW with the gates in a group of their own."""
    trained = net.trained()
    gate = [p for name, p in trained.items() if name.endswith("_gate")]
    rest = [p for name, p in trained.items() if not name.endswith("_gate")]
    return optim.AdamW([{"params": gate}, {"params": rest}], lr=cfg.lr, weight_decay=0.0)


def set_rates(optimizer: optim.AdamW, lr: float, gate_factor: float) -> None:
    """A gate at 0 is the only thing that learns behind it, and AdamW moves it by about lr a step: at the others' rate
    hundreds of steps pass before images are seen at all."""
    gate, rest = optimizer.param_groups
    gate["lr"], rest["lr"] = lr * gate_factor, lr


def gates(net: Flamingo) -> dict[str, float]:
    """tanh of each gate, by name: how far it is open."""
    return {f"{name}_{kind}": getattr(layer, f"{kind}_gate").tanh().item()
            for name, layer in net.gated.items() for kind in ("attn", "mlp")}  # fmt: skip


def describe(net: Flamingo) -> str:
    """What is trained and what is not, in a line."""
    trained = net.trained()
    groups = ", ".join(dict.fromkeys(name.split(".")[0] for name in trained))
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    return f"trained: {sum(p.numel() for p in trained.values()):,} parameters ({groups}); frozen: {frozen:,}"


# --- Frozen models and images


def digits(cfg: Config, split: str) -> tuple[Tensor, Tensor]:
    """uint8 pictures (N, 1, size, 2 size) of a split with one digit, and which. The encoder was trained on pictures of
    two: here the right half is empty."""
    size, count = pretrain.RECIPES[cfg.images].size, {"train": 3000, "test": 1000}[split]
    found = pictures.load(cfg.images, {split: count}, least=1, most=1, size=size, kinds=("left",))[split]
    poses = POSES[: cfg.poses if split == "train" else 1]
    x = torch.cat([pose(found.x) for pose in poses])
    labels = torch.cat([found.digits[:, 0] + DIGITS * i for i in range(len(poses))])
    return F.pad(x, (0, size)), labels


def pool(net: Flamingo, x: Tensor, labels: Tensor) -> Pool:
    """Pictures with the features of the frozen encoder, which are made once."""
    features = [net.features(pretrain.inputs(part)[:, None])[:, 0, 0] for part in x.split(250)]
    return Pool(torch.cat(features), labels, x)


def language_model(cfg: Config, run: Run) -> tuple[Llama, Tensor, Tokenizer]:
    """The language model, tokens of nonsense words that are one token each, and its tokenizer."""
    made = language.nonsense(WORDS)
    if cfg.language_model != "scratch":
        source = hub.resolve(cfg.language_model, run.console)
        model, tokenizer = load.llama(source), load.tokenizer(source)
        ids = [tokenizer.encode(" " + word, add_special_tokens=False) for word in language.nonsense(600)]
        words = torch.tensor([each[0] for each in ids if len(each) == 1])
        return model, words, tokenizer
    tokenizer = language.tokenizer(made)
    words = torch.tensor([tokenizer.encode(" " + word, add_special_tokens=False) for word in made])[:, 0]
    run.seed("language model")
    model = language.fresh(language.shape(tokenizer.vocab_size, cfg.width, cfg.layers))
    optimizer = optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in run.steps(cfg.copy_steps, {"model": model, "optimizer": optimizer}, phase="language"):
        g = run.generator("text", step)
        loss, right = copy_loss(model, *language.texts(words, tokenizer.eos_id or 0, 32, g))
        loss.backward()
        optimizer.step(lr=optim.cosine(step, cfg.copy_steps, 50, 3e-3, 3e-4))
        optimizer.zero_grad()
        run.log(step, copy_loss=loss, copied=right)
    return model, words, tokenizer


def copy_loss(model: Llama, tokens: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the tokens that can be known from those in front of them, and the share that is right."""
    x = model(tokens, hidden=True)[:, :-1][known[:, 1:]]
    wanted = tokens[:, 1:][known[:, 1:]]
    with torch.no_grad():
        right = (head.logits(model, x).argmax(-1) == wanted).float().mean()
    return head.cross_entropy(model, x, wanted), right


def flamingo(cfg: Config, run: Run, encoder: ViT, model: Llama, tokenizer: Tokenizer) -> Flamingo:
    run.seed("model")
    net = Flamingo(
        encoder, model, added_shape(cfg, encoder.config.dim, model.config.dim), ends_with=tokenizer.eos_id or 0
    )
    if not cfg.freeze:
        model.requires_grad_(True)
    return net


def added_shape(cfg: Config, vision_dim: int, dim: int) -> FlamingoConfig:
    frames = cfg.frames if cfg.frames > 1 else 0
    return FlamingoConfig(vision_dim, dim, cfg.latents, cfg.depth, heads=4, head_dim=16, every=cfg.every, frames=frames)


def keep(net: Flamingo, tokenizer: Tokenizer, folder: Path) -> None:
    """What was trained, in OpenFlamingo's names, and the two models around it."""
    convert.save(net, folder)
    save_language.model(net.language_model, folder / "language_model", tokenizer)
    save_vision.vit(net.encoder, folder / "encoder")


# --- What is measured


def evaluate(cfg: Config, run: Run, net: Flamingo, pool: Pool, task: Task) -> None:
    """Accuracy by shots, of new images, and what it depends on."""
    chance, count = 1 / cfg.ways, cfg.episodes
    curves: dict[str, dict[int, float]] = {"new images": {}, "images of another sequence": {}}
    for shots in sorted({0, 1, 2, 4, cfg.shots // 2, cfg.shots}):
        batch = task.draw(pool, count if shots else 3 * count, shots, run.generator("shots", shots))
        curves["new images"][shots] = measure.accuracy(net, pool, batch)
        curves["images of another sequence"][shots] = measure.accuracy(net, pool, batch[: count // 4], measure.others)
        bounds = {} if shots or count < 400 else {"at_least": chance - 0.05, "at_most": chance + 0.05}
        run.check(f"accuracy_{shots}", curves["new images"][shots], **bounds)
    batch = task.draw(pool, count, cfg.shots, run.generator("shots", cfg.shots))
    run.result("accuracy", curves["new images"][cfg.shots], baseline=chance, target=judged(cfg, 0.85))
    run.result("relabeled", measure.accuracy(net, pool, batch.relabeled(run.generator("relabeled"))), baseline=chance,
               target=judged(cfg, 0.85))  # fmt: skip
    run.result("written", measure.written(net, pool, batch), baseline=0, target=judged(cfg, 0.85))
    gap = {} if cfg.shuffle else {"at_most": chance + 0.15}  # blind: the gap to `accuracy` must not be noise
    run.check("other_images", measure.accuracy(net, pool, batch, measure.others), **gap)
    run.check("gray_images", measure.accuracy(net, pool, batch, torch.zeros_like), **gap)
    run.check("nearest_class", measure.nearest(pool, batch))
    if cfg.kept_out >= 3 and cfg.frames == 1:
        new = Task([*range(DIGITS - cfg.kept_out, DIGITS)], task.words, 3)
        batch = new.draw(pool, count, 9, run.generator("kept out"))
        run.result("kept_out", measure.accuracy(net, pool, batch), baseline=1 / 3, target=judged(cfg, 0.55))
        run.check("nearest_class_kept_out", measure.nearest(pool, batch))
    tokens, known = language.pairs(task.words, net.end_of_chunk, count, 8, run.generator("text"), keys=(3, 4))
    run.check("text_alone", measure.text_right(net, tokens, known))
    plots.by_shots(run, curves, chance)


def judged(cfg: Config, target: float) -> float | None:
    """What the built-in settings must reach; controls and other tasks are measured and not judged."""
    return target if not cfg.shuffle and cfg.freeze and cfg.frames == 1 else None


def lesson(cfg: Config, run: Run, net: Flamingo, pools: dict[str, Pool], task: Task, tokenizer: Tokenizer) -> None:
    """The same training in two other ways: with the gates at everybody's learning rate, and with a language model that
    begins at random and is trained along."""
    cfg = replace(cfg, steps=cfg.lesson)
    arms = {"slow_gates": replace(cfg, gate_factor=1.0), "from_scratch": replace(cfg, freeze=False)}
    batch = task.draw(pools["test"], cfg.episodes, cfg.shots, run.generator("shots", cfg.shots))
    for phase, arm in arms.items():
        run.seed(phase)
        model = net.language_model if arm.freeze else language.fresh(net.language_model.config)
        other = flamingo(arm, run, net.encoder, model, tokenizer)
        other.mean, other.deviation = net.mean, net.deviation
        bind(arm, run, other, pools["train"], replace(task, poses=cfg.poses), phase)
        run.check(phase, measure.accuracy(other, pools["test"], batch))
    plots.lesson(run, {MAIN: "frozen language model, fast gates", "slow_gates": "frozen language model, slow gates",
                       "from_scratch": "all from scratch, fast gates"})  # fmt: skip


def draw(run: Run, net: Flamingo, pool: Pool, examples: Episodes, tokenizer: Tokenizer) -> None:
    """The pictures: the mask of a sequence, the gates over the steps, what the images' tokens attend to."""
    tokens = examples.asked(net.image, net.end_of_chunk)
    names = {net.image: "<image>", net.end_of_chunk: "<end>"}
    plots.mask(run, net, tokens[0], [names.get(t) or tokenizer.decode([t]).strip() for t in tokens[0].tolist()])
    plots.gates(run)
    words = [[tokenizer.decode([word]).strip() for word in row] for row in examples.answers.tolist()]
    plots.attention(run, net, pool, examples[:3], pretrain.inputs(pool.x), words)


# --- Memory


def memory_plan(cfg: Config) -> memory.Plan:
    """For `python -m finetune memory flamingo`: of a language model's folder the shape is read; nothing is built."""
    if cfg.language_model == "scratch":
        vocabulary = language.tokenizer(language.nonsense(WORDS)).vocab_size
        shape = language.shape(vocabulary, cfg.width, cfg.layers)
    else:
        shape = load.llama_config(cfg.language_model)
    recipe = pretrain.RECIPES[cfg.images]
    return planned(cfg, shape, pretrain.shape(recipe), known=max(cfg.shots + 1 - cfg.ways, 0) * cfg.batch)


def planned(cfg: Config, shape: LlamaConfig, vision: ViTConfig, known: int) -> memory.Plan:
    """Of a step in which `known` words can be known; the ends of all chunks are learned too."""
    images, (rows, columns) = cfg.shots + 1, vision.grid
    learned = cfg.batch * images + known
    added = added_shape(cfg, vision.dim, shape.dim)
    return cost.plan(added, shape, vision, cfg.batch, images, learned, rows * columns * cfg.frames)


def memory_rows(
    cfg: Config, net: Flamingo, optimizer: optim.AdamW, pool: Pool, batch: Episodes
) -> list[dict[str, Any]]:
    """Bytes of a training step, by formula and as measured."""
    found = planned(cfg, net.language_model.config, net.encoder.config, int(batch.known().sum()))
    predicted = {term.name: term.bytes for term in found.terms}
    return memory.table(predicted, cost.step_bytes(net, optimizer, lambda: binding_loss(net, pool, batch)[0]))
