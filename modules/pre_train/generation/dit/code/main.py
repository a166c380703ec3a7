"""A diffusion Transformer that draws the class it is asked for (Peebles & Xie 2023, arXiv:2212.09748).

    train    x_t = α_t x₀ + σ_t ε;   minimize ‖net(x_t, t, label) − target‖², the label hidden now and then
    draw     out = net(x, t, none) + w · (net(x, t, label) − net(x, t, none)), from noise to an image in some steps

`--prediction flow` makes it a SiT (Ma et al. 2024, arXiv:2401.08740). Reads top to bottom: settings, the run (setup,
loop), drawing, what is measured.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from finetune import memory, ops, optim
from finetune.diffusion import draw, fidelity, images, judge
from finetune.diffusion.ema import Ema
from finetune.diffusion.images import Images
from finetune.diffusion.process import Process
from finetune.diffusion.trained import Trained
from finetune.errors import UserError
from finetune.memory import room
from finetune.runs import checkpoint, config, reading
from finetune.runs.config import bounded
from finetune.runs.run import Run, stable_hash

from . import convert, cost, plots, vae
from .loss import denoising_loss
from .model import SIZES, DiT, DiTConfig

GUIDANCE = (0.0, 1.0, 2.0, 4.0)  # weights of the exhibit


@dataclass
class Config(config.Config):
    steps: int = 4000
    checkpoint_every: int = 1000
    images: Literal["digits", "mnist", "emoji"] = "mnist"  # data that ship in packages: 8×8, 28×28, 32×32 RGB
    data: Path | None = None  # your own instead: a folder of images (subfolders are classes) or an .npz
    size: int | None = bounded(None, at_least=1, at_most=512)  # side to which every image is scaled
    # --- model
    model: Literal["XXS", "XS", "S", "B", "L", "XL"] = "XS"  # S to XL are the paper's
    patch: int = bounded(4, at_least=1, at_most=64)  # side of a patch
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the weights; bfloat16 has float32 masters
    gradient_checkpointing: bool = False  # computes blocks again in the backward pass, to save memory
    # draws latents of an autoencoder that is trained first: a quarter of the side, four channels
    latent: bool = False
    vae_steps: int = bounded(600, at_least=0, at_most=10**9)  # of its training
    # --- process
    # what the network predicts (eps in the paper); flow: the velocity of a straight path
    prediction: Literal["eps", "x0", "v", "flow"] = "v"
    schedule: Literal["linear", "scaled_linear", "cosine"] = "cosine"  # of β (linear in the paper); a flow has its own
    timesteps: int = bounded(1000, at_least=2, at_most=100_000)
    learn_sigma: bool = True  # also the variance of a DDPM step, by its variational bound (a flow has none)
    min_snr: float = bounded(0.0, at_least=0)  # γ of the min-SNR weights of timesteps; 0: all alike
    label_dropout: float = bounded(0.1, at_least=0, at_most=1)  # share of labels that training hides
    # --- training
    batch: int = bounded(32, at_least=1, at_most=1 << 20)  # images of a step
    lr: float = bounded(3e-3, at_least=0)  # peak learning rate; a cosine falls to a tenth
    warmup: int = bounded(100, at_least=0, at_most=10**9)  # steps until the peak
    weight_decay: float = bounded(0.0, at_least=0)  # AdamW's, on matrices only
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    ema: float = bounded(0.999, at_least=0, below=1)  # decay of the averaged weights, which draw
    # --- drawing
    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpm_solver_2m"] = "ddim"  # a flow: euler or heun
    sample_steps: int = bounded(25, at_least=1, at_most=100_000)
    guidance: float = bounded(1.5, at_least=0)  # w: 0 ignores the label, 1 follows it, more exaggerates it
    # guide only this many of the first channels (3 in the paper's code); 0: all
    guided_channels: int = bounded(0, at_least=0, at_most=64)
    samples: int = bounded(500, at_least=20, at_most=10**6)  # images that are judged, all classes alike
    judge_steps: int = bounded(400, at_least=0, at_most=10**6)  # of the classifier that judges
    show_every: int = bounded(500, at_least=1, at_most=10**9)  # steps between two rows of samples_over_training.png
    # --- controls
    without: int = bounded(-1, at_least=-1, at_most=10**6)  # a class that training never sees; -1: none
    shuffle: bool = False  # labels in random order, so that they mean nothing

    @classmethod
    def toy(cls) -> "Config":
        return cls(
            images="digits", patch=2, model="XXS", dtype="float32", steps=600, lr=4e-3, warmup=50, ema=0.99,
            samples=360, guidance=1.5, show_every=100, threads=1,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction == "flow" and self.sampler == "ddim":
            self.sampler = "euler"
        draw.check(self.process(), self.sampler, self.sample_steps, "trailing")

    def process(self) -> Process:
        return Process(self.prediction, "flow" if self.prediction == "flow" else self.schedule, self.timesteps)


def main(cfg: Config, run: Run) -> dict[str, Any]:
    whole, test = load(cfg)
    train = shown(cfg, whole)
    shape, process = model_config(cfg, train), cfg.process()
    check_memory(cfg, shape)
    coder = autoencoder(cfg, run, train, test) if cfg.latent else None
    x0 = coder.encode(images.to_unit(train.x)) if coder else images.to_unit(train.x)
    labels = train.labels
    run.seed("model")
    net = DiT(shape).to(getattr(torch, cfg.dtype))
    net.gradient_checkpointing = cfg.gradient_checkpointing
    trained = dict(net.named_parameters())
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), cfg.weight_decay), lr=cfg.lr)
    ema = Ema(net, cfg.ema)
    model = trained_model(cfg, net, train.classes, coder)
    size, flops = cost.parameters(shape), cost.forward_flops(shape)
    if not run.resume:
        memory.check_disk(run.dir, 20 * 4 * size, "three checkpoints and the model")
    for line in process.notes():
        run.print(line)
    what = "latents" if coder else "images"
    run.print(f"{len(train):,} {what} of {shape.side}×{shape.side} and {len(train.classes)} classes to train on; "
              f"{shape.tokens} patches, {size:,} parameters, {flops / 1e9:.3f} GFLOPs an image")  # fmt: skip
    run.check("loss_at_the_start", loss_at_start(net, process, x0, labels), **start_bounds(cfg))
    seen: dict[str, Tensor] = {}  # step → images drawn then, for a picture
    began, first = perf_counter(), 0
    state = {"trained": trained, "optimizer": optimizer, "ema": ema, "seen": seen}
    for step in run.steps(cfg.steps, state):
        g = run.generator("batch", step)
        rows = torch.randint(len(x0), (cfg.batch,), generator=g)
        t = torch.randint(process.T, (cfg.batch,), generator=g)
        eps = torch.randn(cfg.batch, *x0.shape[1:], generator=g)
        hidden = torch.rand(cfg.batch, generator=g) < cfg.label_dropout
        given = torch.where(hidden, net.classes, labels[rows])  # the null class stands for "some image"
        error, bound = denoising_loss(net, process, x0[rows], given, t, eps, cfg.min_snr)
        (error + bound).backward()
        norm = ops.clip_grad_norm_([p.grad for p in trained.values() if p.grad is not None], cfg.clip)
        lr = optim.cosine(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        ema.update()
        run.log(step, loss=error, grad_norm=norm, lr=lr, **({"bound": bound} if shape.learn_sigma else {}))
        if (step + 1) % cfg.show_every == 0 or step + 1 == cfg.steps:
            with ema.swapped():
                seen[str(step + 1)] = sample(cfg, model, asked(train, 20), cfg.guidance)
        first += 1
    seconds = (perf_counter() - began) / max(first, 1)

    # Saved first: whatever fails below, what was trained is kept.
    with ema.swapped():
        save(net, train.classes, coder, run.dir / "model")
        evaluate(cfg, run, model, whole, train, test)
    plots.over_training(run, seen)
    run.check("parameters", size)
    run.check("gflops_an_image", flops / 1e9)
    if first:
        run.check("images_per_second", cfg.batch / seconds)
        run.record_memory(memory_rows(cfg, net, optimizer, ema, x0[: cfg.batch].clone(), labels[: cfg.batch].clone()))
    return {}


# --- Data and model


def load(cfg: Config) -> tuple[Images, Images]:
    """Images of every class, and a fifth of each to compare with."""
    found = images.load(cfg.data or cfg.images, cfg.size)
    height, width = found.x.shape[-2:]
    if height != width:
        raise UserError(f"the images are {width}×{height}, not square: --size {min(height, width)} makes them so")
    if cfg.without >= len(found.classes):
        raise UserError(f"--without {cfg.without}: the classes are 0 to {len(found.classes) - 1}")
    return found.split(0.2)


def shown(cfg: Config, whole: Images) -> Images:
    """What is trained on: all, or what the controls leave of it."""
    train = whole[whole.labels != cfg.without] if cfg.without >= 0 else whole
    if cfg.shuffle:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(stable_hash(cfg.seed, "shuffle")))
        train = dataclasses.replace(train, labels=train.labels[order])
    return train


def model_config(cfg: Config, data: Images) -> DiTConfig:
    layers, dim, heads = SIZES[cfg.model]
    channels, side = data.x.shape[1], data.x.shape[-1]
    if cfg.latent:
        if side % vae.FACTOR:
            raise UserError(f"--latent: images of {side}×{side} cannot be halved twice: give a --size that can")
        channels, side = vae.LATENTS, side // vae.FACTOR
    if side % cfg.patch:
        what = "latents" if cfg.latent else "images"
        raise UserError(f"--patch {cfg.patch} does not divide {what} of {side}×{side}: give a divisor, or --size")
    learned = cfg.learn_sigma and cfg.prediction != "flow"
    return DiTConfig(side, channels, cfg.patch, dim, layers, heads, len(data.classes), learned)


def autoencoder(cfg: Config, run: Run, train: Images, test: Images) -> vae.VAE:
    """The trained autoencoder, and how well it gives back held-out images: what comes after cannot be better."""
    run.seed("vae")
    coder = vae.VAE(train.x.shape[1])
    weights = [p for p in coder.parameters() if p.requires_grad]
    optimizer = optim.AdamW(weights, lr=2e-3, weight_decay=0.0)
    x = images.to_unit(train.x)
    for step in run.steps(cfg.vae_steps, {"vae": coder, "optimizer": optimizer}, phase="vae"):
        g = run.generator("vae", step)
        batch = x[torch.randint(len(x), (64,), generator=g)]
        noise = torch.randn(len(batch), vae.LATENTS, *(side // vae.FACTOR for side in x.shape[2:]), generator=g)
        error = coder.loss(batch, noise)
        error.backward()
        optimizer.step(lr=optim.cosine(step, cfg.vae_steps, 20, 2e-3, 2e-4))
        optimizer.zero_grad()
        run.log(step, vae_loss=error)
    coder.deviation.data = coder.encode(x).std() * coder.deviation
    real = images.to_unit(test.x)
    again = coder.decode(coder.encode(real))
    run.check("vae_psnr", float(10 * torch.log10(4 / (again - real).square().mean())))  # decibels
    run.check("vae_frechet", fidelity.frechet(fidelity.pixels(images.to_bytes(again)), fidelity.pixels(test.x)))
    plots.reconstructions(run, test.x[:12], images.to_bytes(again[:12]))
    return coder


def save(net: DiT, classes: tuple[str, ...], coder: vae.VAE | None, folder: Path) -> None:
    """The DiT as diffusers opens it, the names of the classes and the autoencoder, if there is one."""
    convert.save(net, folder)
    checkpoint.write_json(folder / "classes.json", list(classes))
    if coder:
        vae.save(coder, folder)


def opened(folder: Path, cfg: Config) -> Trained:
    """The trained network of a finished run, for `python -m finetune sample`."""
    net = convert.load(folder / "model").eval()
    names = reading.json_file(folder / "model/classes.json", list[str])
    if len(names) != net.classes:
        raise UserError(f"{folder / 'model/classes.json'} names {len(names)} classes, the model has {net.classes}")
    coder = vae.load(folder / "model") if cfg.latent else None
    return trained_model(cfg, net, tuple(names), coder)


def trained_model(cfg: Config, net: DiT, classes: tuple[str, ...], coder: vae.VAE | None) -> Trained:
    """What draws: the network with its process, guidance and decoder."""
    image = (net.config.channels, net.config.side, net.config.side)
    return Trained(net, cfg.process(), image, classes, coder.decode if coder else None, cfg.guided_channels or None)


@torch.no_grad()
def loss_at_start(net: DiT, process: Process, x0: Tensor, labels: Tensor, count: int = 1024) -> float:
    """The mean squared error of the untrained network over `count` images: it predicts 0, so of ε it is 1."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(len(x0), (count,), generator=g)
    t, eps = torch.randint(process.T, (count,), generator=g), torch.randn(count, *x0.shape[1:], generator=g)
    parts = zip(*(each.split(128) for each in (x0[rows], labels[rows], t, eps)), strict=True)
    return sum(float(denoising_loss(net, process, *part)[0]) * len(part[0]) for part in parts) / count


def start_bounds(cfg: Config) -> dict[str, float]:
    return {"at_least": 0.98, "at_most": 1.02} if cfg.prediction == "eps" else {}


# --- Drawing


def asked(data: Images, count: int) -> Tensor:
    """`count` labels, all classes alike."""
    return torch.arange(count) % len(data.classes)


def sample(cfg: Config, model: Trained, labels: Tensor, w: float, trace: list[Tensor] | None = None) -> Tensor:
    """Images (N, C, H, W) uint8 of the classes `labels` (N,). Image k has a noise of its own: it is the same in any
    batch, and for any label and w."""
    return model.draw(
        labels, cfg.seed, w, batch=250, sampler=cfg.sampler, steps=cfg.sample_steps, trace=trace
    )  # fmt: skip


# --- What is measured


def evaluate(cfg: Config, run: Run, model: Trained, whole: Images, train: Images, test: Images) -> None:
    """Results, checks and pictures of the trained network's samples, next to a Gaussian fitted to each class."""
    run.print("judging …")
    referee = judge.train_judge(whole, test, cfg.judge_steps)  # it knows every class
    labels = asked(train, cfg.samples)
    real = referee.features(test.x)
    gaussian = fidelity.frechet(referee.features(fidelity.class_gaussian(whole, labels)), real)
    samples = sample(cfg, model, labels, cfg.guidance)
    found = fidelity.fidelity(samples, train, test, referee.features)
    goals = targets_of(cfg, gaussian)
    right = (referee.classify(samples) == labels).double()
    classes = len(train.classes)
    if classes > 1:
        run.result("accuracy", float(right.mean()), baseline=1 / classes, target=goals.get("accuracy"))
    run.result("frechet", found["frechet_features"], baseline=gaussian, target=goals.get("frechet"), higher=False)
    noise = fidelity.frechet(fidelity.pixels(torch.randint_like(samples, 256)), fidelity.pixels(test.x))
    run.result("frechet_pixels", found["frechet"], baseline=noise, target=goals.get("frechet_pixels"), higher=False)
    run.result("one_nn", found["one_nn"])
    run.result("memorization", found["memorization"])
    run.check("judge_accuracy", referee.accuracy)
    if cfg.without >= 0:
        kept = labels != cfg.without
        run.result("accuracy_of_the_removed_class", float(right[~kept].mean()), baseline=1.0, target=0.2, higher=False)
        run.check("accuracy_of_the_others", float(right[kept].mean()))
    rows: list[dict[str, float]] = []
    for w in GUIDANCE if classes > 1 else ():
        part = samples if w == cfg.guidance else sample(cfg, model, labels[: cfg.samples * 2 // 5], w)
        accuracy = (referee.classify(part) == labels[: len(part)]).double().mean().item()
        rows.append({"w": w, "accuracy": accuracy, "frechet": fidelity.frechet(referee.features(part), real)})
        run.check(f"accuracy_w{w:g}", accuracy)
    if rows:
        run.table("guidance", [{name: f"{value:.3g}" for name, value in row.items()} for row in rows])
        plots.guidance(run, rows, gaussian)
    plots.by_class(run, samples, labels)
    trace: list[Tensor] = []
    sample(cfg, model, asked(train, 20), cfg.guidance, trace)
    plots.denoising(run, [*map(model.pictures, trace)])


def targets_of(cfg: Config, gaussian: float) -> dict[str, float]:
    """What the built-in digits must reach; other images are measured and not judged."""
    if cfg.data is not None or cfg.size is not None or cfg.without >= 0:
        return {}
    return {"digits": {"accuracy": 0.8, "frechet_pixels": 150.0},
            "mnist": {"accuracy": 0.9, "frechet": gaussian / 2}}.get(cfg.images, {})  # fmt: skip


# --- Memory


def check_memory(cfg: Config, shape: DiTConfig) -> None:
    """UserError if the step cannot fit into this machine's memory by formula."""
    found = planned(cfg, shape)
    room.check_bytes(found.peak.bytes, "--model, --batch or a larger --patch")


def planned(cfg: Config, shape: DiTConfig) -> memory.Plan:
    return cost.plan(shape, cfg.batch, DTYPES[cfg.dtype], cfg.gradient_checkpointing)


def memory_plan(cfg: Config) -> memory.Plan:
    """For `python -m finetune memory dit`: the images are read, for their size; nothing is trained."""
    return planned(cfg, model_config(cfg, load(cfg)[0]))


def memory_rows(
    cfg: Config, net: DiT, optimizer: optim.AdamW, ema: Ema, x: Tensor, labels: Tensor
) -> list[dict[str, Any]]:
    """Bytes of a training step, by formula and as measured."""
    predicted = {term.name: term.bytes for term in planned(cfg, net.config).terms}
    return memory.table(predicted, cost.step_bytes(net, optimizer, ema, x, labels))


DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
