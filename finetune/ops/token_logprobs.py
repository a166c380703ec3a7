"""Log-probabilities of given tokens and the entropy of their distributions: what policy gradients need of the logits.

    z = logits / temperature                          (N, V)
    logprob_i = z_i[targets_i] − logsumexp(z_i)       (N,)
    entropy_i = −Σ_j p_ij · log p_ij,   p = softmax(z)

log_softmax and gather without the (N, V) in between: one pass over the logits with a running maximum (Milakov &
Gimelshein 2018, arXiv:1805.02867). Rows whose target is ignore_index give 0 and get gradient 0, whatever they hold, NaN
and infinity too. A logit of −inf is a token that cannot be sampled: probability and gradient 0. Arithmetic and results
in fp32 whatever the logits' dtype.

Backward keeps two numbers a row:

    d logprob_i / d z_ij = [j = t] − p_ij,   d entropy_i / d z_ij = −p_ij · (log p_ij + entropy_i)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._backends import native_float
from finetune.ops._op import op
from finetune.ops._samples import Sample


@op
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """logits (N, V), unit stride in V (else copied), and targets (N,) int64 in [0, V) or ignore_index → logprobs (N,),
    with `entropy` also entropies (N,), both float32. Gradients for the logits, of their dtype, from both.

    A target outside the vocabulary raises an error that names its position; on a GPU, where the host would have to wait
    for that, it makes the row NaN.
    """
    counted = targets != ignore_index
    outside = torch.nonzero(counted & ((targets < 0) | (targets >= logits.shape[1])))
    if len(outside):
        i = int(outside[0])
        raise RuntimeError(f"token_logprobs: targets[{i}] is {targets[i]}, outside the vocabulary of {logits.shape[1]}")
    logits = logits.masked_fill(~counted[:, None], 0)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logp = z.log_softmax(-1)  # (N, V)
    of_target = logp.gather(1, targets.masked_fill(~counted, 0)[:, None])[:, 0]
    logprobs = of_target.masked_fill(~counted, 0.0)
    if not entropy:
        return logprobs
    p = logp.exp()
    plogp = p * logp.masked_fill(p == 0, 0.0)
    return logprobs, -plogp.sum(-1).masked_fill(~counted, 0.0)


@token_logprobs.check
def _(temperature: float, **_) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


@token_logprobs.supports
def _(backend: str, logits: Tensor, **_) -> str | None:
    return native_float(backend, logits)


@token_logprobs.results
def _(output: tuple[Tensor, ...], entropy: bool, **_) -> Tensor | tuple[Tensor, ...]:
    return output[:2] if entropy else output[0]


@token_logprobs.fake()
def _(logits: Tensor, entropy: bool, **_) -> tuple[Tensor, ...]:
    n = logits.shape[0]
    shapes: tuple[tuple[int, ...], ...] = ((n,), (n if entropy else 0,), (2, n))
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in shapes)


@token_logprobs.fake("token_logprobs_backward")
def _(logits: Tensor, **_) -> Tensor:
    return logits.new_empty(logits.shape)


def keep(ctx, inputs, output) -> tuple[Tensor, ...]:
    ctx.mark_non_differentiable(*(output[2:] if inputs["entropy"] else output[1:]))
    return output[1:]


@token_logprobs.backward(keep=keep)
def _(operators, ctx, dlogprobs: Tensor | None, dentropy: Tensor | None, _):
    options = ctx.rest["temperature"], ctx.rest["ignore_index"]
    dlogits = operators.token_logprobs_backward(dlogprobs, dentropy, *ctx.saved_tensors, *options)
    return dlogits, *(None,) * 4


@token_logprobs.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(name, n, vocab, ignored=0.0, scale=1.0, bench=False, **kwargs) -> Sample:
        def args():
            logits = torch.randn(n, vocab, generator=g, dtype=torch.float64) * scale
            targets = torch.randint(vocab, (n,), generator=g)
            targets[torch.rand(n, generator=g) < ignored] = kwargs.get("ignore_index", -100)
            if not bench:
                logits[targets == kwargs.get("ignore_index", -100)] = torch.nan
            return logits, targets

        size = n * vocab
        flops = (12.0 + (15.0 if kwargs.get("entropy") else 10.0)) * size
        return Sample(name, args if bench else args(), kwargs, grad=(0,), bench=bench, flops=flops, bytes=12.0 * size)

    yield make("small", 5, 11)
    yield make("entropy", 4, 37, entropy=True)
    yield make("temperature", 3, 64, temperature=0.7, entropy=True)
    yield make("ignored", 13, 29, ignored=0.5, entropy=True)
    yield make("ignore index", 9, 10, ignored=0.5, ignore_index=3)
    yield make("all ignored", 4, 8, ignored=2.0, entropy=True)
    yield make("one", 1, 1, entropy=True)
    yield make("empty", 0, 16, entropy=True)
    yield make("wide", 2, 4133, entropy=True)
    yield make("large logits", 6, 257, scale=1e4, entropy=True)
    yield make("large logits, hot", 3, 2100, scale=1e4, temperature=1e4, entropy=True)
    rising = torch.linspace(-40, 40, 2 * 2500, dtype=torch.float64).reshape(2, 2500)  # the maximum moves all the time
    yield Sample("rising", (rising, torch.tensor([2499, 7])), {"entropy": True}, grad=(0,))
    logits = torch.randn(4, 45, generator=g, dtype=torch.float64)
    logits[:, ::3] = -torch.inf
    yield Sample("masked", (logits, torch.tensor([1, 2, 44, 4])), {"entropy": True}, grad=(0,))
    wider = torch.randn(7, 3, 40, generator=g, dtype=torch.float64)
    yield Sample("strided", (wider[:, 1, :24], torch.randint(24, (7,), generator=g)), {"entropy": True}, grad=(0,))
    yield Sample("transposed", (wider[:, 1].t(), torch.randint(7, (40,), generator=g)), grad=(0,))
    yield from make("aligned", 5, 64, entropy=True).at_odd_addresses()
    yield from make("rows", 3, 24, entropy=True).far_apart((0, 0))
    yield make("bench", 256, 49152, bench=True)
    yield make("bench entropy", 256, 49152, entropy=True, bench=True)
