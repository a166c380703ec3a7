"""Flamingo (Alayrac et al. 2022, arXiv:2204.14198): a frozen language model learns to look, and then learns new words
from a few images in its prompt.

    1  a language model that can look back: SmolLM2, or a small one trained here to continue what it has read; frozen
    2  between frozen encoder and frozen language model, train the resampler and the gated layers on sequences
           <image> dax <end> <image> wug <end> … <image> → ?         words drawn for each sequence
    3  ask for images, classes and words that were not seen together: nothing is trained any more

Reads top to bottom: settings, the run (setup, loop), then what is measured.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import ops, optim
from finetune.errors import UserError
from finetune.lm import head
from finetune.lm.io import hub, load
from finetune.lm.io import save as save_language
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.run import Run
from finetune.vision import pictures, pretrain
from finetune.vision import save as save_vision

from . import convert, language
from .binding import Episodes, Pool, Task
from .model import Flamingo, FlamingoConfig

DIGITS = 10
PART = 50  # sequences that are evaluated at once


@dataclass
class Config(config.Config):
    steps: int = 1500
    checkpoint_every: int = 500
    images: Literal["digits", "mnist"] = "mnist"  # handwritten digits, 8×8 or 28×28, that ship in packages
    # --- language model
    # scratch: a small one, trained here on nonsense words; or smollm2, a folder, a .gguf file, a hub id
    language_model: str = "scratch"
    copy_steps: int = bounded(2000, at_least=0, at_most=10**9)  # scratch: steps of its training on words alone
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
    kept_out: int = bounded(3, at_least=0, at_most=8)  # digits, the last ones, that are never bound in training
    # --- training
    batch: int = bounded(32, at_least=1, at_most=1 << 16)  # sequences of a step
    lr: float = bounded(2e-3, at_least=0)  # peak learning rate; a cosine falls to a tenth
    gate_factor: float = bounded(30.0, at_least=0)  # the gates' learning rate over the others'
    warmup: int = bounded(50, at_least=0, at_most=10**9)
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    # --- evaluation
    episodes: int = bounded(400, at_least=20, at_most=10**6)  # sequences of each accuracy
    shuffle: bool = False  # control: words of training sequences are drawn for every image, so that nothing is bound

    @classmethod
    def toy(cls) -> "Config":
        return cls(images="digits", steps=500, copy_steps=800, threads=1)

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
    run.seed("model")
    net = flamingo(cfg, encoder, model, tokenizer)
    splits = {name: digits(cfg, name) for name in ("train", "test")}
    net.standardize(pretrain.inputs(splits["train"][0]))
    pools = {name: pool(net, *split) for name, split in splits.items()}
    trained = net.trained()
    bound = [*range(DIGITS - cfg.kept_out)]
    task = Task(bound, words, cfg.ways, cfg.frames)
    frozen = fingerprint(model)
    run.print(f"{sum(p.numel() for p in trained.values()):,} parameters are trained, of {len(trained)} tensors in "
              f"{', '.join(dict.fromkeys(name.split('.')[0] for name in trained))}; "
              f"{sum(p.numel() for p in net.parameters() if not p.requires_grad):,} are frozen")  # fmt: skip
    examples = task.draw(pools["test"], 6, cfg.shots, run.generator("examples"))
    before = told(net, pools["test"], examples, tokenizer)

    optimizer = gated_optimizer(net, cfg)
    for step in run.steps(cfg.steps, {"trained": trained, "optimizer": optimizer}):
        batch = task.draw(pools["train"], cfg.batch, cfg.shots, run.generator("batch", step))
        loss, right = binding_loss(net, pools["train"], batch)
        loss.backward()
        norm = ops.clip_grad_norm_([p.grad for p in trained.values() if p.grad is not None], cfg.clip)
        lr = optim.cosine(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
        set_rates(optimizer, lr, cfg.gate_factor)
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, loss=loss, right=right, grad_norm=norm, lr=lr, **gates(net))

    # Saved first: whatever fails below, what was trained is kept.
    keep(net, tokenizer, run.dir / "model")
    if cfg.freeze:
        run.check("language_model_changed", fingerprint(model) != frozen, at_most=0)
    evaluate(cfg, run, net, pools["test"], task)
    after = told(net, pools["test"], examples, tokenizer)
    run.table("sequences", [a | {"before": b["answer"], "after": c["answer"]} for a, b, c in
                            zip(shown(examples, pools["test"], tokenizer), before, after, strict=True)])  # fmt: skip
    return {}


# --- The algorithm


def binding_loss(net: Flamingo, pool: Pool, batch: Episodes) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) of the words that can be known, those of classes shown before, and of the ends of chunks; and
    the share of these words that is right. An image's own token is never learned."""
    tokens = batch.tokens(net.image, net.end_of_chunk)
    x = net.hidden(tokens, net.media(pool.features[batch.images]))  # (B, T, C)
    known = batch.known()
    learned = torch.stack([known, torch.ones_like(known), torch.zeros_like(known)], 2).flatten(1)  # word, end, image
    logits, wanted = net.logits(x[learned]).float(), tokens.roll(-1, 1)[learned]  # (N, V + 1), (N,)
    word = wanted != net.end_of_chunk
    return F.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted)[word].float().mean()


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


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# --- Frozen models and images


def digits(cfg: Config, split: str) -> tuple[Tensor, Tensor]:
    """uint8 pictures (N, 1, size, 2 size) of a split with one digit, and which. The encoder was trained on pictures of
    two: here the right half is empty."""
    size, count = pretrain.RECIPES[cfg.images].size, {"train": 3000, "test": 1000}[split]
    found = pictures.load(cfg.images, {split: count}, least=1, most=1, size=size, kinds=("left",))[split]
    return F.pad(found.x, (0, size)), found.digits[:, 0]


def pool(net: Flamingo, x: Tensor, labels: Tensor) -> Pool:
    """Pictures with the features of the frozen encoder, which are made once."""
    features = [net.features(pretrain.inputs(part)[:, None])[:, 0, 0] for part in x.split(250)]
    return Pool(torch.cat(features), labels, x)


def language_model(cfg: Config, run: Run) -> tuple[Llama, Tensor, Tokenizer]:
    """The language model, tokens of nonsense words that are one token each, and its tokenizer."""
    made = language.nonsense(64)
    if cfg.language_model != "scratch":
        source = hub.resolve(cfg.language_model, run.console)
        model, tokenizer = load.llama(source), load.tokenizer(source)
        ids = [tokenizer.encode(" " + word, add_special_tokens=False) for word in language.nonsense(2000)]
        words = torch.tensor([each[0] for each in ids if len(each) == 1])
        return model, words, tokenizer
    tokenizer = language.tokenizer(made)
    words = torch.tensor([tokenizer.encode(" " + word, add_special_tokens=False) for word in made])[:, 0]
    run.seed("language model")
    model = language.small(tokenizer.vocab_size, cfg.width, cfg.layers)
    optimizer = optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in run.steps(cfg.copy_steps, {"model": model, "optimizer": optimizer}, phase="language"):
        g = run.generator("text", step)
        loss, right = copy_loss(model, *language.texts(words, tokenizer.eos_id, 32, g))
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


def flamingo(cfg: Config, encoder: nn.Module, model: Llama, tokenizer: Tokenizer) -> Flamingo:
    shape = FlamingoConfig(
        encoder.config.dim,
        model.config.dim,
        cfg.latents,
        cfg.depth,
        4,
        16,
        cfg.every,
        cfg.frames if cfg.frames > 1 else 0,
    )
    net = Flamingo(encoder, model, shape, ends_with=tokenizer.eos_id)
    if not cfg.freeze:
        model.requires_grad_(True)
    return net


def keep(net: Flamingo, tokenizer: Tokenizer, folder: Path) -> None:
    """What was trained, in OpenFlamingo's names, and the two models around it."""
    convert.save(net, folder)
    save_language.model(net.language_model, folder / "language_model", tokenizer)
    save_vision.vit(net.encoder, folder / "encoder")


# --- What is measured

Change = Callable[[Tensor], Tensor]  # of the features (B, M, frames, patches, C)


@torch.no_grad()
def chosen(net: Flamingo, pool: Pool, batch: Episodes, change: Change | None = None) -> Tensor:
    """(B,): which of the sequence's words is the most probable behind the last image."""
    found = []
    for rows in torch.arange(len(batch.words)).split(PART):
        part = Episodes(batch.images[rows], batch.classes[rows], batch.words[rows])
        features = pool.features[part.images]
        media = net.media(features if change is None else change(features))
        x = net.hidden(part.asked(net.image, net.end_of_chunk), media)[:, -1]
        found.append(net.logits(x).gather(1, part.words).argmax(1))
    return torch.cat(found)


def accuracy(net: Flamingo, pool: Pool, batch: Episodes, change: Change | None = None) -> float:
    return (chosen(net, pool, batch, change) == batch.classes[:, -1]).float().mean().item()


def evaluate(cfg: Config, run: Run, net: Flamingo, pool: Pool, task: Task) -> None:
    """Accuracy by shots, of new images, and what it depends on."""
    chance, count = 1 / cfg.ways, cfg.episodes
    for shots in sorted({0, 1, 2, 4, cfg.shots}):
        batch = task.draw(pool, count, shots, run.generator("shots", shots))
        run.check(f"accuracy_{shots}", accuracy(net, pool, batch))
    batch = task.draw(pool, count, cfg.shots, run.generator("shots", cfg.shots))
    run.result("accuracy", accuracy(net, pool, batch), baseline=chance, target=0.85)
    other = batch.relabeled(run.generator("relabeled"))
    run.result("relabeled", accuracy(net, pool, other), baseline=chance, target=0.85)
    if cfg.kept_out >= 3 and cfg.frames == 1:
        new = Task([*range(DIGITS - cfg.kept_out, DIGITS)], task.words, 3)
        found = accuracy(net, pool, new.draw(pool, count, 9, run.generator("kept out")))
        run.result("kept_out", found, baseline=1 / 3, target=0.55)
    g = run.generator("blind")
    run.check("other_images", accuracy(net, pool, batch, lambda x: x[torch.randperm(len(x), generator=g)]))
    run.check("grey_images", accuracy(net, pool, batch, lambda x: x.mean((0, 1, 2, 3), keepdim=True).expand_as(x)))


@torch.no_grad()
def told(net: Flamingo, pool: Pool, batch: Episodes, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """What is written behind the last image of each sequence, freely."""
    media = net.media(pool.features[batch.images])
    answers = net.generate(batch.asked(net.image, net.end_of_chunk), media, most=3)
    return [{"answer": tokenizer.decode(answer).strip()} for answer in answers]


def shown(batch: Episodes, pool: Pool, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Each sequence as text, with the digit in the place of its image."""
    rows = []
    for images, answers in zip(batch.images, batch.answers, strict=True):
        names = ["".join(str(pool.labels[i].item()) for i in image) for image in images]
        words = [tokenizer.decode([answer]).strip() for answer in answers.tolist()]
        pairs = " ".join(f"[{name}] {word}" for name, word in zip(names[:-1], words[:-1], strict=True))
        rows.append({"sequence": f"{pairs} [{names[-1]}]", "right": words[-1]})
    return rows
