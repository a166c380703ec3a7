"""What each op is timed against: torch's ways to compute the same, op → (its arguments) → label → a call.

The fastest is the one to beat. What a training loop would compute once for all layers (tables, masks) is computed
before the call and not timed. On a GPU the kernels of flash-attn and Liger are included where these are installed.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

Call = Callable[[], Any]


def on_gpu_with(package: str, x: torch.Tensor) -> bool:
    return x.is_cuda and importlib.util.find_spec(package) is not None


def rms_norm(x, weight, eps=1e-5):
    ways = {"F.rms_norm": lambda: F.rms_norm(x, weight.shape, weight, eps)}
    if on_gpu_with("liger_kernel", x):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        ways["Liger"] = lambda: LigerRMSNormFunction.apply(x, weight, eps)
    return ways


def layer_norm(x, weight, bias, eps=1e-5):
    return {"F.layer_norm": lambda: F.layer_norm(x, weight.shape, weight, bias, eps)}


def group_norm_silu(x, weight, bias, groups, eps=1e-5):
    return {"F.group_norm, F.silu": lambda: F.silu(F.group_norm(x, groups, weight, bias, eps))}


def modulate(x, shift, scale, eps=1e-6):
    """As DiT writes it."""
    shift, scale = (of_items(each, x) for each in (shift, scale))
    return {"F.layer_norm · (1 + scale) + shift": lambda: F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift}


def gate_residual(x, gate, branch):
    gate = of_items(gate, x)
    return {"x + gate · branch": lambda: x + gate * branch, "torch.addcmul": lambda: torch.addcmul(x, gate, branch)}


def of_items(each, x):
    """(B, C) as (B, 1, …, C), to go with x (B, …, C)."""
    return each.reshape(each.shape[0], *(1,) * (x.dim() - 2), each.shape[1])


def swiglu(gate, up):
    ways = {"F.silu · up": lambda: F.silu(gate) * up}
    if on_gpu_with("liger_kernel", gate):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        ways["Liger"] = lambda: LigerSiLUMulFunction.apply(gate, up)
    return ways


def gelu(x):
    return {"F.gelu": lambda: F.gelu(x, approximate="tanh")}


def rope(x, cos, sin, positions):
    """Hugging Face's apply_rotary_pos_emb, with the tables' rows already gathered, doubled and cast."""
    c, s = (torch.cat((t[positions],) * 2, -1)[:, :, None].to(x.dtype) for t in (cos, sin))  # (B, T, 1, D)

    def call():
        x1, x2 = x.chunk(2, dim=-1)
        return x * c + torch.cat((-x2, x1), dim=-1) * s

    return {"rotate_half": call}


def attention(q, k, v, *, causal=True, scale=None, lengths=None, cu_seqlens=None, window=0, softcap=0.0, mask=None):
    from finetune.ops.attention import capped, visible

    (_, tq, heads, _), (_, tk, kv_heads, _) = q.shape, k.shape
    hides = (lengths, cu_seqlens, mask)
    plain = all(each is None for each in hides) and not window and (not causal or tq == tk)
    seen = None if plain else visible(q, k, causal, lengths, cu_seqlens, window, mask)[:, None]  # (B, 1, Tq, Tk)
    options = {"scale": scale, "enable_gqa": heads != kv_heads}

    def composed():  # torch has no fused form of a softcap
        queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
        keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
        scores = capped(queries @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale), softcap)
        hidden = ~visible(q, k, causal, lengths, cu_seqlens, window, mask)[:, None]
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
        return (p @ values).transpose(1, 2)

    if softcap:
        return {"composed": composed}

    def sdpa(q, k, v, **how):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, **how, **options).transpose(1, 2)

    def each_document():
        ends = cu_seqlens.tolist()
        pieces = [sdpa(*(t[:, a:b] for t in (q, k, v)), is_causal=causal) for a, b in itertools.pairwise(ends)]
        return torch.cat(pieces, dim=1)

    ways = {}
    if q.dtype != torch.float32 and lengths is None and mask is None and not window and on_gpu_with("flash_attn", q):
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        if cu_seqlens is None:
            ways["flash-attn"] = lambda: flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)
        else:
            ends, longest = cu_seqlens.to(q.device, torch.int32), int(cu_seqlens.diff().max())
            packed = {"softmax_scale": scale, "causal": causal}
            ways["flash-attn"] = lambda: flash_attn_varlen_func(
                q[0], k[0], v[0], ends, ends, longest, longest, **packed
            )[None]
    if plain:
        return {"SDPA": lambda: sdpa(q, k, v, is_causal=causal), **ways}
    masked = {"SDPA, mask": lambda: sdpa(q, k, v, attn_mask=seen)}
    return masked | ways if cu_seqlens is None or window else masked | ways | {"SDPA, a document each": each_document}


def kv_cache(what, *args):
    """Indexing; a quantized append and gather by elementwise ops."""
    from finetune.ops.kv_cache import dequantize, quantize

    def append(k, v, k_cache, v_cache, slots, k_scale=None, v_scale=None):
        for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            if scale is None:
                cache.flatten(0, 1).index_copy_(0, slots, x)
                continue
            stored, scales = quantize(x, cache.dtype)
            cache.view(torch.int8).flatten(0, 1).index_copy_(0, slots, stored.view(torch.int8))
            scale.flatten(0, 1).index_copy_(0, slots, scales)

    def gather(cache, table, lengths, scale=None, dtype=None):
        x = cache[table].flatten(1, 2)
        x = x if scale is None else dequantize(x, scale[table].flatten(1, 2), dtype or torch.float32)
        hidden = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        return x.masked_fill_(hidden[..., None, None], 0)

    def copy(caches, pairs):
        for cache in caches:
            cache[pairs[:, 1]] = cache[pairs[:, 0]]

    ways: dict[str, Callable[..., Any]] = {"append": append, "gather": gather, "copy": copy}
    return {"indexing": lambda: ways[what](*args)}


def paged_attention(
    q, k_cache, v_cache, table, lengths, k_scale, v_scale, *, scale=None, window=0, softcap=0.0, lse=False
):
    """The blocks gathered into dense keys and values, then SDPA with a mask; with a softcap, which SDPA lacks, its two
    products and a softmax."""
    from finetune.ops.attention import capped
    from finetune.ops.kv_cache import dequantize
    from finetune.ops.paged_attention import visible

    q = q if q.dim() == 4 else q[:, None]
    mask = visible(q, table.shape[1] * k_cache.shape[1], lengths, window)[:, None]

    def dense(cache, scale):
        x = cache[table].flatten(1, 2)
        return (x if scale is None else dequantize(x, scale[table].flatten(1, 2), q.dtype)).transpose(1, 2)

    def call():
        how = {"attn_mask": mask, "scale": scale, "enable_gqa": q.shape[2] != k_cache.shape[2]}
        k, v = dense(k_cache, k_scale), dense(v_cache, v_scale)
        if softcap:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[1], 1) for x in (k, v))
            scores = capped(q.transpose(1, 2) @ k.mT * (scale or q.shape[-1] ** -0.5), softcap)
            return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)[:, 0]
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, **how).transpose(1, 2)[:, 0]

    return {"gather, SDPA": call}


def linear_cross_entropy(x, weight, targets, *, ignore_index=-100, z_loss=0.0, reduction="mean"):
    def call():
        logits = F.linear(x, weight)
        loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction).float()
        if z_loss:
            squares = logits.float().logsumexp(-1).square()[targets != ignore_index]
            loss = loss + z_loss * (squares.mean() if reduction == "mean" else squares.sum())
        return loss

    ways = {"F.linear, F.cross_entropy": call}
    if on_gpu_with("liger_kernel", x) and not z_loss:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(ignore_index=ignore_index, reduction=reduction)
        ways["Liger"] = lambda: liger(weight, x, targets).float()
    return ways


def token_logprobs(logits, targets, *, temperature=1.0, ignore_index=-100, entropy=False):
    def call():
        logp = F.log_softmax(logits.float() / temperature if temperature != 1.0 else logits, -1, dtype=torch.float32)
        ignored = targets == ignore_index
        logprobs = logp.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0].masked_fill(ignored, 0.0)
        if not entropy:
            return logprobs
        return logprobs, -(logp.exp() * logp).sum(-1).masked_fill(ignored, 0.0)

    return {"log_softmax, gather": call}


def gae(rewards, values, next_values, terminated, truncated, *, gamma=0.99, lam=0.95):
    """The loop over time that RL code has, with what it can do for all steps at once done before the loop."""

    def call():
        r, v, following = rewards.float(), values.float(), next_values.float()
        deltas = torch.addcmul(r, following, ~terminated, value=gamma) - v
        decay = (gamma * lam) * (~(terminated | truncated)).float()
        advantages = torch.empty_like(deltas)
        advantage = torch.zeros_like(deltas[0])
        for t in reversed(range(len(deltas))):
            advantage = torch.addcmul(deltas[t], decay[t], advantage)
            advantages[t] = advantage
        return advantages, advantages + v

    return {"loop": call}


def adamw(params, grads, exp_avgs, exp_avg_sqs, masters=None, *, grad_scale=1.0, step, **hyper):
    """torch.optim.AdamW's own update; bfloat16 parameters go through fp32, as the moments are."""
    from torch.optim.adamw import adamw as update  # an attribute of torch.optim that it deletes again

    counts = torch.full(
        (len(params),), float(step - 1), device=params[0].device
    )  # where torch's fused kernel wants them
    steps = list(counts.unbind())

    def call(**how):
        counts.fill_(step - 1)
        wide = masters or (params if params[0].dtype == torch.float32 else [p.float() for p in params])
        g = grads if wide[0].dtype == grads[0].dtype else [t.float() for t in grads]
        if grad_scale != 1.0:
            g = torch._foreach_mul(g, grad_scale)
        update(wide, g, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, maximize=False, **how, **hyper)
        if wide is not params:
            torch._foreach_copy_(params, wide)

    return {"AdamW fused": lambda: call(fused=True), "AdamW foreach": lambda: call(foreach=True)}


def adamw8bit(params, grads, exp_avgs, exp_avg_maxs, exp_avg_sqs, exp_avg_sq_maxs, masters=None, **hyper):
    """The moments widened, torch.optim.AdamW's update, the moments rounded to codes again."""
    from finetune.ops.adamw8bit import dequantize, quantize

    def call(label):
        first = [dequantize(*pair, True) for pair in zip(exp_avgs, exp_avg_maxs, strict=True)]
        second = [dequantize(*pair, False) for pair in zip(exp_avg_sqs, exp_avg_sq_maxs, strict=True)]
        adamw(params, grads, first, second, masters, **hyper)[label]()
        for moments, codes, maxs, signed in (
            (first, exp_avgs, exp_avg_maxs, True),
            (second, exp_avg_sqs, exp_avg_sq_maxs, False),
        ):
            for moment, code, top in zip(moments, codes, maxs, strict=True):
                for old, new in zip((code, top), quantize(moment, signed), strict=True):
                    old.copy_(new)

    return {"AdamW fused, bucketize": lambda: call("AdamW fused")}


def clip_grad_norm(grads, max_norm):
    params = [torch.nn.Parameter(torch.empty_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g

    def call(foreach):
        return torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=foreach).float()

    return {"clip_grad_norm_": lambda: call(False), "clip_grad_norm_ foreach": lambda: call(True)}


def cast(x, dtype, **how):
    """torch's own conversion; where it has none (stochastic), the same bits by torch's integer operations."""
    from finetune.ops import cast

    if how:
        return {"Philox and integers": lambda: cast.reference(x, dtype, **how)}
    return {"x.to": lambda: x.to(dtype)}


def global_norm(tensors):
    def call(foreach):
        return torch.nn.utils.get_total_norm(tensors, foreach=foreach).float()

    return {"get_total_norm": lambda: call(False), "get_total_norm foreach": lambda: call(True)}


def unscale_check_finite(grads, inverse_scale):
    """What GradScaler.unscale_ calls, and the norm that clipping needs next."""

    def call(foreach):
        found_inf = torch.zeros((), device=grads[0].device)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inverse_scale)
        return found_inf, torch.nn.utils.get_total_norm(grads, foreach=foreach).float().square()

    return {"_amp_foreach…unscale_, get_total_norm": lambda: call(False), "the same, foreach": lambda: call(True)}


def loss_scale_update(scale, growth_tracker, hysteresis_tracker, found_inf, **how):
    """torch has the plain rule as one operator, but no hysteresis: that takes torch.where."""
    from finetune.ops import loss_scale_update_

    def plain():
        torch._amp_update_scale_(
            scale, growth_tracker, found_inf, how.get("growth_factor", 2.0), how.get("backoff_factor", 0.5),
            how["growth_interval"],
        )  # fmt: skip

    if how.get("policy") == "deepspeed" or how.get("hysteresis", 1) > 1:
        call = partial(loss_scale_update_.reference, scale, growth_tracker, hysteresis_tracker, found_inf, **how)
        return {"torch.where": call}
    return {"_amp_update_scale_": plain}


def quantized_linear(x, weight, bias=None):
    """torch has no product of any of these weights: it dequantizes once, before the call, and reads them dense."""
    w = weight.dequantize(x.dtype)
    return {"F.linear of the dense weight": lambda: F.linear(x, w, bias)}


OPS = (
    rms_norm,
    layer_norm,
    group_norm_silu,
    modulate,
    gate_residual,
    swiglu,
    gelu,
    rope,
    attention,
    linear_cross_entropy,
    adamw,
    adamw8bit,
    token_logprobs,
    cast,
    gae,
    clip_grad_norm,
    global_norm,
    unscale_check_finite,
    loss_scale_update,
    kv_cache,
    paged_attention,
    quantized_linear,
)
BASELINES: dict[str, Callable[..., dict[str, Call]]] = {f.__name__: f for f in OPS}
