"""LoRA and its variants on frozen linear layers: y = x Wᵀ + s (x Aᵀ) Bᵀ with A (r, in), B (out, r).

    LoRA    s = alpha / r, A uniform, B = 0                        Hu et al. 2021, arXiv:2106.09685
    rsLoRA  s = alpha / √r, so that a larger r does not shrink it  Kalajdzievski 2023, arXiv:2312.03732
    PiSSA   starts from the r largest singular triples of W: W + s B A − s B₀ A₀ with s B₀ A₀ = U_r S_r V_rᵀ
                                                                   Meng et al. 2024, arXiv:2404.02948
    DoRA    (W + s B A) · m / ‖W + s B A‖, by rows, m trained and the norm held constant in the backward pass
                                                                   Liu et al. 2024, arXiv:2402.09353

PiSSA's paper overwrites W with W − s B₀ A₀. Here W stays, whatever is trained: several adapters share it, each can be
switched off, and a hash of it does not change. Adapters are fp32 whatever the dtype of W, and all terms are summed
in fp32 before the result is rounded: a bf16 adapter would swallow its own first updates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.errors import UserError, nearest
from finetune.lm.llama import Llama
from finetune.peft import whole
from finetune.peft.quantize import FrozenLinear
from finetune.peft.whole import fits, set_module
from finetune.peft.whole import train_modules as train_modules  # modules that an adapter trains whole

LAYERS = (
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.o",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)  # all linear ones of a Llama's block
TARGETS = tuple(name.partition(".")[2] for name in LAYERS)
Linear = nn.Linear | FrozenLinear


Term = tuple[Tensor, Tensor, float]  # A, B, s


class LoRAFunction(torch.autograd.Function):
    """x Wᵀ + bias + Σ s (x Aᵀ) Bᵀ over adapters, saving x, and x Aᵀ where B is trained (autograd would also keep the
    terms). `base.weight` is read in both passes and not kept: of a quantized layer it is a dense copy. The bias is
    frozen.

    With g the gradient of y and h = s · g B:   dx = g W + Σ h A,   dA = hᵀ x,   dB = s · gᵀ (x Aᵀ).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Linear, scales: tuple[float, ...], *factors: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        wide = rows.to(factors[0].dtype)
        y = F.linear(rows, base.weight).to(wide.dtype)
        if base.bias is not None:
            y += base.bias
        lows = []
        for a, b, scale, learns in zip(factors[::2], factors[1::2], scales, ctx.needs_input_grad[4::2], strict=True):
            low = wide @ a.T  # (N, r)
            y.addmm_(low, b.T, alpha=scale)
            lows.append(low if learns else None)
        ctx.save_for_backward(x, *factors, *lows)
        ctx.base, ctx.scales = base, scales
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, needed = len(ctx.scales), ctx.needs_input_grad
        x, *factors = ctx.saved_tensors
        factors, lows = factors[: 2 * count], factors[2 * count :]
        g = grads[0].reshape(-1, grads[0].shape[-1])  # (N, out)
        wide, rows = g.to(factors[0].dtype), x.reshape(-1, x.shape[-1])
        dx = (g @ ctx.base.weight).to(wide.dtype) if needed[0] else None
        found: list[Tensor | None] = []
        for i, (a, b, scale, low) in enumerate(zip(factors[::2], factors[1::2], ctx.scales, lows, strict=True)):
            h = (wide @ b).mul_(scale)  # (N, r)
            if dx is not None:
                dx.addmm_(h, a)
            found.append(h.T @ rows.to(wide.dtype) if needed[3 + 2 * i] else None)
            found.append((wide.T @ low).mul_(scale) if needed[4 + 2 * i] else None)
        return None if dx is None else dx.to(x.dtype).view(x.shape), None, None, *found


class LoRA(nn.Module):
    """One adapter of one layer. LoRA's A is uniform in ±1/√in, as peft's and torch's own linear layers, and B is 0; in
    all forms the layer starts as it was. Dropout is on the adapter's input only."""

    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)
    start_A: Tensor | None  # PiSSA: what A and B were at first
    start_B: Tensor | None
    magnitude: nn.Parameter | None  # (out,) DoRA
    row_squares: Tensor | None  # (out,) DoRA: Σ W² of each row

    def __init__(
        self,
        base: Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        rslora: bool = False,
        dora: bool = False,
        pissa: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        start: tuple[Tensor | None, Tensor | None] = None, None
        if pissa:
            start = a, b = principal(base.weight.detach(), rank, self.scale)
            self.lora_A.data, self.lora_B.data = a.clone(), b.clone()
        elif device.type != "meta":
            with torch.no_grad():
                self.lora_A.uniform_(-1, 1, generator=generator).div_(math.sqrt(base.in_features))
        for name, part in zip(("start_A", "start_B"), start, strict=True):
            self.register_buffer(name, part, persistent=False)
        squares = base.weight.detach().float().square().sum(1) if dora else None
        self.register_buffer("row_squares", squares, persistent=False)
        self.magnitude = None if squares is None else nn.Parameter(squares.sqrt())

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def terms(self) -> list[Term]:
        """What the adapter adds to W is Σ s B A."""
        if self.start_A is None or self.start_B is None:
            return [(self.lora_A, self.lora_B, self.scale)]
        return [(self.lora_A, self.lora_B, self.scale), (self.start_A, self.start_B, -self.scale)]

    def factor(self, weight: Tensor) -> Tensor:
        """DoRA's m / ‖W + s B A‖ (out,), without making the sum: ‖w‖² + 2 s b·(W Aᵀ) + s² b·(A Aᵀ) b for each row."""
        assert self.magnitude is not None
        assert self.row_squares is not None
        with torch.no_grad():
            a, b = side_by_side(self.terms())
            cross = (weight.to(a.dtype) @ a.T).mul_(2).addmm_(b, a @ a.T)
            norm = cross.mul_(b).sum(1).add_(self.row_squares).clamp_(min=0).sqrt_()
        return self.magnitude / norm


def side_by_side(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """One A and B for several: the As one below the other, the s · B side by side."""
    return torch.cat([a for a, _, _ in terms]), torch.cat([b * s for _, b, s in terms], 1)


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """PiSSA's A₀ = √(S_r / s) V_rᵀ and B₀ = U_r √(S_r / s), from the eigenvectors of the smaller Gram matrix in
    float64: half the time of torch's SVD in float32."""
    wide = weight.double()
    tall = wide.shape[0] > wide.shape[1]
    if rank > min(wide.shape):
        raise UserError(f"PiSSA: a layer of {tuple(weight.shape)} has no {rank} singular values: use a smaller rank")
    values, vectors = torch.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)
    vectors, sizes = vectors[:, -rank:], values[-rank:].clamp(min=1e-30).sqrt()  # ascending: the largest are last
    root = (sizes / scale).sqrt()
    other = (wide @ vectors if tall else wide.T @ vectors) / sizes
    u, v = (other, vectors) if tall else (vectors, other)
    return (v * root).T.float().contiguous(), (u * root).float().contiguous()


class LoRALinear(nn.Module):
    """A frozen linear layer `base`, adapters by name, and the weight of each that is `active`."""

    base: Linear
    parts: nn.ModuleDict
    active: dict[str, float]

    def __init__(self, base: Linear, **parts: LoRA) -> None:
        super().__init__()
        self.base, self.parts = base.requires_grad_(False), nn.ModuleDict(parts)
        self.active = dict.fromkeys(parts, 1.0)

    def terms(self) -> list[Term]:
        """The terms of all active adapters, each s multiplied by the adapter's weight."""
        return [(a, b, w * s) for name, w in self.active.items() for a, b, s in self.part(name).terms()]

    def part(self, name: str) -> LoRA:
        """The adapter of this name."""
        part = self.parts[name]
        assert isinstance(part, LoRA)
        return part

    @property
    def weight(self) -> Tensor:
        """(out, in): W and the active adapters, through which gradients flow. The loss and generation take the head
        so, which they multiply themselves."""
        return self.exact.to(self.base.weight.dtype)

    @property
    def exact(self) -> Tensor:
        """`weight` before it is rounded to W's dtype, fp32."""
        total = self.base.weight.float()
        for a, b, scale in self.terms():
            total = total.addmm(b, a, alpha=scale)
        factor = self.factor()
        return total if factor is None else total * factor[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), in x's dtype."""
        if not self.active:
            return self.base(x)
        if self.training and any(self.part(name).dropout for name in self.active):
            y = self.dropped(x)
        else:
            terms = self.terms()
            factors = [factor for a, b, _ in terms for factor in (a, b)]
            y = LoRAFunction.apply(x, self.base, tuple(s for *_, s in terms), *factors)
        factor = self.factor()
        if factor is None:
            return y
        bias = 0 if self.base.bias is None else self.base.bias.to(factor.dtype)
        return ((y - bias) * factor + bias).to(x.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        """The forward pass with dropout, on autograd."""
        y = self.base(x).float()
        for name, weight in self.active.items():
            part = self.part(name)
            inputs = F.dropout(x, part.dropout).float(), x.float()  # PiSSA subtracts its start without dropout
            for (a, b, scale), given in zip(part.terms(), inputs, strict=False):
                y = y + weight * scale * F.linear(F.linear(given, a), b)
        return y.to(x.dtype)

    def factor(self) -> Tensor | None:
        """DoRA's factor, if the active adapter is DoRA: it is then the only one (`activate`)."""
        part = self.part(next(iter(self.active))) if self.active else None
        if part is None or part.magnitude is None:
            return None
        return part.factor(self.base.weight)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer of W and the active adapters, summed in fp32."""
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = self.base.in_features, self.base.out_features
        linear.weight = nn.Parameter(self.weight.detach())
        if self.base.bias is not None:
            linear.bias = nn.Parameter(self.base.bias.detach().clone())
        return linear


def apply_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] = TARGETS,
    generator: torch.Generator | None = None,
    *,
    name: str = "default",
    rslora: bool = False,
    dora: bool = False,
    pissa: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> list[nn.Parameter]:
    """Freezes `model`, adds the adapter `name` to every linear layer that a target names, and makes it the
    active one; returns its parameters.

    Targets, and the keys of `rank_pattern` and `alpha_pattern`, are regular expressions for the end of a layer's name,
    beginning at a dot: `q`, `attn.q`, `blocks.[01].mlp.(up|down)`. Of several patterns the first that fits counts.
    `head` adapts the output projection; one that is the embedding too is then a layer of its own (`whole.untie`).
    UserError for one that fits no linear layer, or if there is an adapter of that name already.
    """
    whole.swap(model, ())
    if not 0 <= dropout < 1:
        raise UserError(f"LoRA's dropout must be in [0, 1), not {dropout}")
    if re.search(r"\W", name) or not name:
        raise UserError(f"an adapter's name has letters, digits and underscores, not {name!r}")
    if name in names(model):
        raise UserError(f"the model has an adapter '{name}' already: merge it first, or name this one otherwise")
    if isinstance(model, Llama) and "head" in targets:
        whole.untie(model)
        if dropout:
            raise UserError("the head is multiplied as W + s B A, on which there is no dropout: set it to 0")
    ranks, alphas, layers = dict(rank_pattern or {}), dict(alpha_pattern or {}), linear_layers(model)
    for pattern in (*targets, *ranks, *alphas):
        if not any(fits(pattern, layer) for layer in layers):
            known = {ending for layer in layers for ending in endings(layer)}
            raise UserError(f"LoRA target '{pattern}' names no linear layer{nearest(pattern, known)}")
    for layer in layers:
        if (wanted := first_fit(ranks, layer, rank)) < 1:
            raise UserError(f"LoRA's rank must be at least 1, not {wanted}")
    model.requires_grad_(False)
    whole.freeze(model)
    made = []
    for layer, linear in layers.items():
        if any(fits(target, layer) for target in targets):
            if not isinstance(linear, LoRALinear):
                linear = LoRALinear(linear)
                whole.set_base(model, layer, linear)
            part = LoRA(linear.base, first_fit(ranks, layer, rank), first_fit(alphas, layer, alpha), dropout,
                        generator, rslora, dora, pissa)  # fmt: skip
            linear.parts[name] = part
            made += list(part.parameters())
    if made:
        activate(model, {name: 1.0})
    return made


def parse_targets(text: str) -> list[str]:
    """Layers to adapt, separated by commas: `q`, or `q_proj` as Hugging Face calls it, `head` or `lm_head`, or
    `all-linear` for all of TARGETS. UserError for another name."""
    known = {whole.hf_module(f"blocks.0.{at}").rpartition(".")[2]: at.rpartition(".")[2] for at in LAYERS}
    known |= {name: name for name in TARGETS} | {"head": "head", "lm_head": "head"}
    found: list[str] = []
    for name in text.split(","):
        if name != "all-linear" and name not in known:
            listed = ", ".join((*TARGETS, "head", "all-linear"))
            raise UserError(f"--targets: '{name}' is not a linear layer of a Llama: they are {listed}")
        found += TARGETS if name == "all-linear" else (known[name],)
    return list(dict.fromkeys(found))


def first_fit(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that fits the name."""
    return next((value for pattern, value in patterns.items() if fits(pattern, name)), default)


def endings(name: str) -> set[str]:
    """`blocks.0.attn.q` → {`q`, `attn.q`, `0.attn.q`, `blocks.0.attn.q`}."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def linear_layers(model: nn.Module) -> dict[str, Linear | LoRALinear]:
    """Linear layers by name, adapted ones as such."""
    kinds = (nn.Linear, FrozenLinear, LoRALinear)
    found = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    return {
        name: m for name, m in found.items() if not isinstance(found.get(name.removesuffix(".base")), LoRALinear)
        or isinstance(m, LoRALinear)
    }  # fmt: skip


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of every adapted layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))


def names(model: nn.Module) -> set[str]:
    """The adapters of a model."""
    state = whole.kept(model)
    layers = [*model.modules(), *state.base.values()]
    return {name for layer in layers if isinstance(layer, LoRALinear) for name in layer.parts} | set(state.parts)


def activate(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Switches: these adapters count, each times its weight, and no others; {} is the base model. UserError for an
    unknown name, and for DoRA with another adapter or with a weight: it is not a sum of W and a change."""
    known = names(model)
    for name in weights:
        if name not in known:
            raise UserError(f"there is no adapter '{name}'{nearest(name, known)}")
    whole.swap(model, weights)
    if any(weight != 1 for weight in weights.values()):
        whole.refuse_mixing(model, weights)
    layers = list(adapters(model))
    for _, layer in layers:
        for name in weights:
            plain = len(weights) == 1 and weights[name] == 1
            if name in layer.parts and layer.part(name).magnitude is not None and not plain:
                raise UserError(f"the adapter '{name}' is DoRA's: it can be switched on and off, but not mixed")
        layer.active = {name: float(weight) for name, weight in weights.items() if name in layer.parts}


@torch.no_grad()
def combine(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """A new adapter `name` whose change of W is the weighted sum of the others' (peft's `combination_type="cat"`): its
    rank is the sum of theirs. It becomes the active one, frozen."""
    if name in names(model):
        raise UserError(f"the model has an adapter '{name}' already")
    whole.refuse_mixing(model, weights)
    activate(model, weights)
    for _, layer in adapters(model):
        if layer.active:
            a, b = side_by_side(layer.terms())
            part = LoRA(layer.base, len(a), len(a))
            part.lora_A.data, part.lora_B.data = a, b
            layer.parts[name] = part.requires_grad_(False)
    activate(model, {name: 1.0})


def merge(model: nn.Module, keep: bool = False) -> None:
    """Replaces every adapted layer by a plain one of W and the active adapters; modules that the active one holds
    whole stay. With `keep` the adapted layers are remembered for `unmerge`: subtracting the adapters again would leave
    W rounded, and quantized codes have no sum."""
    for name, layer in list(adapters(model)):
        linear = layer.merged()
        if keep:
            linear.__dict__["adapted"] = layer  # not registered: the model is a plain one
        set_module(model, name, linear)
    if not keep:
        whole.settle(model)


def unmerge(model: nn.Module) -> None:
    """Undoes `merge(model, keep=True)`, to the last bit."""
    for name, linear in list(model.named_modules()):
        if isinstance(layer := linear.__dict__.get("adapted"), LoRALinear):
            set_module(model, name, layer)


def unload(model: nn.Module) -> None:
    """Removes all adapters: the model is the base again."""
    activate(model, {})
    for name, layer in list(adapters(model)):
        set_module(model, name, layer.base)
    whole.settle(model)


def base_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The tensors of the model without its adapters, by the names that they have without them."""
    replaced = whole.kept(model).base
    for name, tensor in model.state_dict().items():
        if ".parts." not in name and name.rpartition(".")[0] not in replaced:
            yield name.replace(".base.", "."), tensor
    for at, module in replaced.items():
        for name, tensor in module.state_dict().items():
            if ".parts." not in f".{name}":
                yield f"{at}.{name}".replace(".base.", "."), tensor
