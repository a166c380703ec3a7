"""What a step costs: FLOPs of a token by formula, and the rate that this machine reaches."""

import math
from time import perf_counter

import torch

from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama


def flops_per_token(model: GPT | Llama, length: int) -> float:
    """6 per parameter of a matrix product, and 12 · layers · width · length of attention, of which causality leaves
    half (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
    looked_up = model.positions.weight.numel() if isinstance(model, GPT) else 0  # the embedding is the head too
    multiplied = sum(p.numel() for p in model.parameters()) - looked_up
    return 6 * multiplied + 6 * model.config.layers * model.config.dim * length


def matmul_rate(size: int = 1024, seconds: float = 0.2) -> float:
    """FLOPs a second of torch's fp32 matrix product with this run's threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out, best, until = torch.empty(size, size), math.inf, perf_counter() + seconds
    while perf_counter() < until or best == math.inf:
        began = perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, perf_counter() - began)
    return 2 * size**3 / best
