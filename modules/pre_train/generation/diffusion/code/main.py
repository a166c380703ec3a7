"""Denoising diffusion (Ho et al. 2020): a network learns to tell the noise in an image, and draws by removing it.

    x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε,    loss = |ε − ε̂(x_t, t, label)|²

Reads top to bottom: settings, loss, training, drawing, what is measured. bound.py has the likelihood, oracle.py the 2-D
mixture whose exact answer is known, exhibits.py the pictures. The README explains every metric and every choice.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune import memory, ops, optim
from finetune.diffusion import draw, fidelity, images, targets, trained
from finetune.diffusion.ema import Ema
from finetune.diffusion.judge import train_judge
from finetune.diffusion.process import Process
from finetune.errors import UserError
from finetune.memory import room
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import cost, exhibits, oracle
from .bound import bound, denoised, gaussian_bits, step_bits
from .unet import UNet


@dataclass
class Config(config.Config):
    steps: int = 2000
    checkpoint_every: int = 500
    images: Literal["digits", "mnist", "emoji"] = "digits"  # 8×8, 28×28, 32×32 in color; without --data
    data: Path | None = None  # a folder of images (subfolders are classes) or an npz with x and labels
    side: int = bounded(0, at_least=0, at_most=512)  # pixels to scale to; 0: as they are
    # --- Process
    prediction: Literal["eps", "x0", "v", "flow"] = "eps"  # what the network says of x_t
    schedule: Literal["linear", "scaled_linear", "cosine", "flow"] = (
        "linear"  # of the noise; flow with --prediction flow
    )
    timesteps: int = bounded(1000, at_least=2, at_most=100_000)  # T
    zero_snr: bool = False  # no image is left at T (Lin et al. 2023); with v or x0
    # --- Network
    width: int = bounded(32, at_least=8, at_most=4096)  # channels at full resolution
    levels: int = bounded(2, at_least=1, at_most=8)  # resolutions, each half of the one above
    blocks: int = bounded(1, at_least=1, at_most=64)  # of a level, on the way down
    heads: int = bounded(4, at_least=1, at_most=1024)  # of attention
    attention: int = bounded(1, at_least=0, at_most=8)  # levels with attention, from below; the middle always has it
    dropout: float = bounded(0.1, at_least=0, below=1)  # within blocks, against copying the images
    learned_variance: bool = False  # a second output per pixel: the variance between β̃ and β (Nichol & Dhariwal 2021)
    # --- Training
    batch: int = bounded(128, at_least=1, at_most=1 << 20)  # images of a step
    lr: float = bounded(2e-3, at_least=0)  # peak learning rate; a cosine takes it to a tenth
    warmup: int = bounded(100, at_least=0, at_most=10**9)  # steps until the peak
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    ema: float = bounded(0.998, at_least=0, below=1)  # decay of the average of the weights, which is what draws
    label_dropout: float = bounded(0.1, at_least=0, at_most=1)  # share of images trained without their label
    min_snr: float = bounded(0.0, at_least=0)  # γ of min-SNR weighting (Hang et al. 2023), often 5; 0: none
    # --- Drawing
    # auto: dpm_solver_2m; of a flow euler, at zero terminal SNR ddim
    sampler: Literal["auto", "ddpm", "ddim", "euler", "heun", "dpm_solver_2m"] = "auto"
    sample_steps: int = bounded(25, at_least=1, at_most=100_000)
    spacing: Literal["leading", "trailing", "linspace", "karras"] = "trailing"  # which timesteps are visited
    eta: float = bounded(0.0, at_least=0, at_most=1)  # of DDIM: 0 draws no noise, 1 as much as DDPM
    variance: Literal["small", "large"] = "small"  # of DDPM's steps, unless learned: β̃ or β
    guidance: float = bounded(1.0, at_least=0, at_most=100)  # classifier-free: 0 ignores the label, above 1 stresses it
    # --- Measures
    samples: int = bounded(0, at_least=0, at_most=1_000_000)  # images that are drawn and judged; 0: as many as held out
    bound_rows: int = bounded(16, at_least=0, at_most=1 << 16)  # images at each timestep of the likelihood; 0: none
    oracle_steps: int = bounded(2000, at_least=0, at_most=10**7)  # steps on the 2-D mixture
    exhibits: bool = True  # pictures: every sampler, inpainting, interpolation, an animation
    # ---
    shuffle: bool = False  # control: labels in random order, so that they say nothing

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=350, batch=64, width=24, heads=1, lr=3e-3, warmup=30, ema=0.99, dropout=0.0, bound_rows=2,
                   oracle_steps=800, threads=1)  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples == 1:
            raise UserError("--samples 1: a distribution of one image cannot be measured: give two or more, or 0")
        draw.check(self.process(), **self.how())

    def process(self) -> Process:
        schedule = "flow" if self.prediction == "flow" else self.schedule
        return Process(self.prediction, schedule, self.timesteps, self.zero_snr)

    def how(self) -> dict[str, Any]:
        """The sampler and its settings."""
        sampler = draw.suiting(self.process()) if self.sampler == "auto" else self.sampler
        return {"sampler": sampler, "steps": self.sample_steps, "spacing": self.spacing, "eta": self.eta}


# --- The algorithm


def loss(net: UNet, process: Process, x0: Tensor, labels: Tensor, t: Tensor, eps: Tensor, cfg: Config) -> Tensor:
    """The weighted squared error (N,) of what the network says of x_t; with a learned variance, plus the bound."""
    x = process.add_noise(x0, eps, t)
    output = net(x, t, labels)
    spread = None
    if cfg.learned_variance:
        output, spread = output.chunk(2, 1)
    wanted = targets.target(process.kind, x0, eps, process.bar[t])
    error = (output - wanted).square().flatten(1).mean(1)
    if cfg.min_snr:
        error = error * targets.min_snr_weight(process.kind, process.bar[t], cfg.min_snr).to(error)
    if spread is not None:
        # The bound teaches the variance only, not the mean: L_hybrid, with λ = 0.001 for the sum over T terms.
        said = torch.cat([output.detach(), spread], 1)
        found, log_var = denoised(lambda *_: said, process, x, t, "learned")
        error = error + 0.001 * cfg.timesteps * step_bits(process, x0, found, log_var, t)
    return error


def main(cfg: Config, run: Run) -> dict[str, Any]:
    process = cfg.process()
    for note in process.notes():
        run.print(note)
    everything = images.load(cfg.data or cfg.images, cfg.side or None)
    train, test = everything.split(1 / 3 if len(everything) < 3000 else 1 / 5)
    if min(len(train), len(test)) < 2:
        raise UserError(f"{len(everything)} images are too few to learn from and hold some out: give a dozen or more")
    run.print(f"{len(train):,} images to train on, {len(test):,} held out, {'×'.join(map(str, train.x.shape[1:]))}, "
              f"{len(train.classes)} classes")  # fmt: skip
    x_train, labels_train = images.to_unit(train.x), train.labels
    if cfg.shuffle:
        labels_train = labels_train[torch.randperm(len(train), generator=run.generator("shuffle"))]

    shape = network_shape(cfg, train)
    side = (train.x.shape[-2], train.x.shape[-1])
    check_room(run, cost.plan(shape, cfg.batch, side))
    run.seed("model")
    net = UNet(**shape)
    net(x_train[:1], torch.zeros(1), labels_train[:1])  # a size that does not fit is refused before anything is trained
    parameters = [*net.parameters()]
    optimizer = optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.0)
    ema = Ema(net, cfg.ema)
    run.print(f"{sum(p.numel() for p in parameters):,} parameters")

    for step in run.steps(cfg.steps, {"net": net, "optimizer": optimizer, "ema": ema}):
        rng = run.generator("batch", step)
        rows = torch.randint(len(train), (cfg.batch,), generator=rng)
        x0, labels = x_train[rows], labels_train[rows]
        # Some images lose their label, so that one network learns both halves of guidance.
        dropped = torch.rand(cfg.batch, generator=rng) < cfg.label_dropout
        labels = labels.masked_fill(dropped, net.classes)
        t = torch.randint(process.T, (cfg.batch,), generator=rng)
        eps = torch.randn(x0.shape, generator=rng)
        mean = loss(net, process, x0, labels, t, eps, cfg).mean()
        mean.backward()
        norm = ops.clip_grad_norm_([p.grad for p in parameters if p.grad is not None], cfg.clip)
        lr = optim.cosine(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        ema.update()
        run.log(step, loss=mean, grad_norm=norm, lr=lr)

    # From here on the network has the averaged weights, which are saved first.
    with ema.swapped():
        channels, height, width = train.x.shape[1:]
        model = trained.Trained(net, process, (channels, height, width), train.classes)
        trained.save(run.dir / "model", "unet", shape, model)
        evaluate(cfg, run, model, train, test)
    if cfg.steps:
        x, labels = x_train[: cfg.batch].clone(), labels_train[: cfg.batch].clone()
        predicted = {term.name: term.bytes for term in cost.plan(shape, len(x), side).terms}
        run.record_memory(memory.table(predicted, cost.step_bytes(net, optimizer, ema, x, labels)))
    run.next_commands = [("draw more images", f"sample {shlex.quote(str(run.dir))}")]
    return {}


# --- What is measured


def evaluate(cfg: Config, run: Run, model: trained.Trained, train: images.Images, test: images.Images) -> None:
    """Draws as many images of each class as are held out, and measures them, the held-out ones and the baselines."""
    count = cfg.samples or len(test)
    order = torch.arange(count) % len(test)
    labels = test.labels[torch.randperm(len(test), generator=run.generator("labels"))[order]]
    drawn = model.draw(labels, seed=cfg.seed, guidance=cfg.guidance, variance=cfg.variance, **cfg.how())
    images.save(run.dir / "samples.png", exhibits.by_class(drawn, labels, len(train.classes)))

    judge = train_judge(train, test) if len(train.classes) > 1 else None
    features = judge.features if judge else None
    real = train[torch.randperm(len(train), generator=run.generator("real"))[: len(test)]]
    noise = torch.randint(256, test.x.shape, dtype=torch.uint8, generator=run.generator("noise"))
    rows = {
        "drawn": (drawn, labels),
        "training images": (real.x, real.labels),
        "a Gaussian per class": (fidelity.class_gaussian(train, labels, cfg.seed), labels),
        "one Gaussian": (fidelity.one_gaussian(train.x, count, cfg.seed), labels),
        "noise": (noise, test.labels),
    }
    found = {name: fidelity.fidelity(x, train, test, features) for name, (x, _) in rows.items()}
    if judge:
        for name, (x, wanted) in rows.items():
            found[name]["judge"] = (judge.classify(x) == wanted).double().mean().item()
    run.table("drawn images, and what the measures say of others",
              [{"images": name, **{k: f"{v:.3g}" for k, v in row.items()}} for name, row in found.items()])  # fmt: skip
    own, chance = found["drawn"], 1 / len(train.classes)
    if judge:
        run.check("judge_on_real", judge.accuracy)
        run.result("judge", own["judge"], baseline=chance, target=target(cfg, run, 0.8, 0.95))
    noisy = found["noise"]["frechet"]
    run.result("frechet", own["frechet"], baseline=noisy, target=target(cfg, run, 150, 60), higher=False)
    run.result("one_nn", own["one_nn"], baseline=1.0, target=target(cfg, run, None, 0.66), higher=False)
    run.result("memorization", own["memorization"], target=target(cfg, run, None, 0.9))
    checks = {f"{name.split()[0]}_{key}": value for name, row in found.items() if name != "drawn"
              for key, value in row.items()}  # fmt: skip
    for name, value in checks.items():
        run.check(name, value)

    if cfg.bound_rows and cfg.prediction != "flow":
        likelihood(cfg, run, model, train, test)
    if cfg.oracle_steps and cfg.prediction != "flow":
        mixture(cfg, run)
    if cfg.exhibits:
        exhibits.write(cfg, run, model, train, test, judge)


def target(cfg: Config, run: Run, toy: float | None, full: float) -> float | None:
    """A target of the digits; other images are measured and not judged."""
    if cfg.images != "digits" or cfg.data is not None or cfg.side:
        return None
    return toy if run.toy else full


def likelihood(cfg: Config, run: Run, model: trained.Trained, train: images.Images, test: images.Images) -> None:
    """The bound in bits a dimension of the held-out images, given their class, against a Gaussian per class."""

    def predict(labels: Tensor) -> draw.Predict:
        return lambda x, t: model.net(x, t, labels)

    model.net.eval()
    bits, terms = bound(predict, model.process, train, test, "large", run.generator("bound"), cfg.bound_rows)
    gaussian = gaussian_bits(train, test)
    run.result("bits_per_dim", bits, baseline=gaussian, target=gaussian, higher=False)
    exhibits.bound_by_t(run.dir / "bound.png", model.process, terms)


def mixture(cfg: Config, run: Run) -> None:
    """The same loss on eight Gaussians in the plane, where the best prediction is known."""
    process, rng = Process("eps", "linear"), run.generator("oracle")
    net, error, without = oracle.learn(process, cfg.oracle_steps, rng)
    run.result("mixture_error", error, baseline=without, target=0.05, higher=False)
    points = oracle.sample(net, process, 4000, rng)
    run.check("mixture_weights_off", float((oracle.mode_weights(points) - oracle.WEIGHTS).abs().max()))
    counts = [8, 16, 32, 64, 128, 256]
    found = oracle.errors(counts, rng)
    for name, row in found.items():
        run.check(f"order_{name}", oracle.order(counts, row))
    exhibits.oracle(run.dir / "oracle.png", points, counts, found)


# --- The network


def network_shape(cfg: Config, data: images.Images) -> dict[str, Any]:
    """The arguments of `UNet`."""
    names = ("width", "levels", "blocks", "heads", "attention", "dropout", "learned_variance")
    return {"channels": data.x.shape[1], "classes": len(data.classes)} | {name: getattr(cfg, name) for name in names}


def check_room(run: Run, plan: memory.Plan) -> None:
    """UserError if a training step cannot fit into the memory by formula, or checkpoints on the disk."""
    room.check_bytes(plan.peak.bytes, "--batch, --width, --levels or --blocks")
    if not run.resume:
        room.check_disk(run.dir, 20 * 4 * plan.parameters, "three checkpoints and the model")


def memory_plan(cfg: Config) -> memory.Plan:
    """For `python -m finetune memory diffusion`: the images are read, for their size; nothing is trained."""
    data = images.load(cfg.data or cfg.images, cfg.side or None)
    return cost.plan(network_shape(cfg, data), cfg.batch, (data.x.shape[-2], data.x.shape[-1]))


def opened(folder: Path, cfg: Config) -> trained.Trained:
    """The trained network of a finished run, for `python -m finetune sample`."""
    return trained.load(folder / "model", UNet)
