import torch
import triton
import triton.language as tl


@triton.jit
def scan_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + tl.program_id(0) * n + i, i < n, 0.0)
    reached = (i[:, None] >= i[None, :]).to(tl.float32)  # a triangle of ones
    tl.store(y + tl.program_id(0) * n + i, tl.sum(reached * v[None, :], 1), i < n)


def scan(x):
    y = torch.empty_like(x)
    scan_kernel[(x.size(0),)](x, y, x.size(1), triton.next_power_of_2(x.size(1)))
    return y
