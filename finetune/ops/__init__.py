"""The ops of the project: `from finetune import ops; ops.rms_norm(x, weight)`. `_op.py` explains how a call runs."""

# ruff: noqa: F401

from finetune.environment import BACKENDS
from finetune.ops._op import REGISTRY, BackendUnavailable, Op, register_all, table, use_backend
from finetune.ops._samples import Sample
from finetune.ops.adamw import adamw_
from finetune.ops.adamw8bit import adamw8bit_
from finetune.ops.attention import attention
from finetune.ops.cast import cast
from finetune.ops.clip_grad_norm import clip_grad_norm_
from finetune.ops.gae import gae
from finetune.ops.gate_residual import gate_residual
from finetune.ops.gelu import gelu
from finetune.ops.global_norm import global_norm
from finetune.ops.group_norm_silu import group_norm_silu
from finetune.ops.kv_cache import kv_cache_append_, kv_cache_copy_, kv_cache_gather
from finetune.ops.layer_norm import layer_norm
from finetune.ops.linear_cross_entropy import linear_cross_entropy
from finetune.ops.loss_scale_update import loss_scale_update_
from finetune.ops.modulate import modulate
from finetune.ops.paged_attention import paged_attention
from finetune.ops.quantized_linear import QuantizedWeight, quantized_linear
from finetune.ops.rms_norm import rms_norm
from finetune.ops.rope import rope
from finetune.ops.swiglu import swiglu
from finetune.ops.token_logprobs import token_logprobs
from finetune.ops.unscale_check_finite import unscale_check_finite_

register_all()
