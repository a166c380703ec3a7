"""What each ladder computes: its inputs, the float64 answer, torch's own, and what any kernel must at least do."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.kernels.alone import Kernel


@dataclass(frozen=True)
class Problem:
    """One topic at one size. The kernels take inputs, then result and scratch, then sizes."""

    inputs: list[Tensor]
    scratch: list[int]  # fp32 elements of each scratch tensor
    result: tuple[int, ...]  # shape, fp32
    result_at: int  # its place among the outputs
    sizes: tuple[int, ...]
    exact: Callable[[], Tensor]  # float64
    torch: Callable[[], Tensor]  # in the kernels' own precision
    flops: int
    least_bytes: int  # each input read once, the result written once
    floor: float = 0.0  # error that any order of the operations may have

    def run(self, kernel: Kernel) -> Tensor:
        """The kernel's result; what it does not write stays NaN."""
        outputs = [torch.full((n,), math.nan) for n in self.scratch]
        result = torch.full(self.result, math.nan)
        outputs.insert(self.result_at, result)
        kernel(self.inputs, outputs, self.sizes)
        return result

    def check(self, result: Tensor) -> float:
        """The largest error against float64. ValueError if it exceeds twice torch's own, plus 1e-6 of the largest value
        and the floor."""
        exact = self.exact()
        bound = 2 * float((self.torch().double() - exact).abs().max()) + 1e-6 * float(exact.abs().max()) + self.floor
        error = float((result.double() - exact).abs().nan_to_num(math.inf).max())
        if not error <= bound:
            raise ValueError(f"the result is {error:.3g} away from float64, the bound is {bound:.3g}")
        return error


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# A sum of n fp32 terms in any order may be off by √n·UNIT·Σ|x| (Higham & Mary 2019, doi:10.1137/18M1226312).
UNIT = 2**-24


def softmax(rows: int, columns: int, seed: int = 0) -> Problem:
    """Per element: a subtraction, an exponential, an addition, a division, and the comparison for the maximum."""
    x = 3 * normal(seed, rows, columns)
    n, floor = rows * columns, math.sqrt(columns) * UNIT * float(x.softmax(-1).max())
    return Problem(
        [x], [], (rows, columns), 0, (rows, columns), lambda: x.double().softmax(-1), lambda: x.softmax(-1),
        5 * n, 8 * n, floor,
    )  # fmt: skip


def reduction(n: int, seed: int = 0) -> Problem:
    x = normal(seed, n) + 0.5
    floor = math.sqrt(n) * UNIT * float(x.abs().sum())
    return Problem(
        [x], [1024], (1,), 1, (n,), lambda: x.double().sum()[None], lambda: x.sum()[None], n, 4 * n + 4, floor
    )  # fmt: skip


def transpose(rows: int, columns: int, seed: int = 0) -> Problem:
    x = normal(seed, rows, columns)
    n = rows * columns
    return Problem([x], [], (columns, rows), 0, (rows, columns), lambda: x.double().t(), lambda: x.t(), 0, 8 * n)


def matmul(m: int, n: int, k: int, seed: int = 0) -> Problem:
    a, b = normal(seed, m, k, dtype=torch.bfloat16), normal(seed + 1, k, n, dtype=torch.bfloat16)
    floor = math.sqrt(k) * UNIT * float((a.abs().float() @ b.abs().float()).max())
    return Problem(
        [a, b], [], (m, n), 0, (m, n, k), lambda: a.double() @ b.double(), lambda: a.float() @ b.float(),
        2 * m * n * k, 2 * (m * k + k * n) + 4 * m * n, floor,
    )  # fmt: skip


def attention(heads: int, q_len: int, k_len: int, dim: int, seed: int = 0) -> Problem:
    """FLOPs of the two products; the softmax's are some 5·H·M·N more."""
    q, k, v = (normal(seed + i, heads, n, dim, dtype=torch.bfloat16) for i, n in enumerate((q_len, k_len, k_len)))

    def exact() -> Tensor:
        return F.scaled_dot_product_attention(q.double(), k.double(), v.double())

    def own() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    bytes_ = 2 * heads * dim * (q_len + 2 * k_len) + 4 * heads * q_len * dim
    # the scores; or the results of eight splits and their lse; or q, k and v padded
    scratch = heads * max(q_len * k_len, q_len * 8 * (64 + 1), (q_len + 2 * k_len) * 32)
    return Problem([q, k, v], [scratch], (heads, q_len, dim), 0, (heads, q_len, k_len, dim), exact, own,
                   4 * heads * q_len * k_len * dim, bytes_)  # fmt: skip


TOPICS: dict[str, Callable[..., Problem]] = {
    "transpose": transpose,
    "reduction": reduction,
    "softmax": softmax,
    "matmul": matmul,
    "attention": attention,
}
# Sizes that no tile, vector or warp divides, and the smallest ones.
ODD: dict[str, Sequence[tuple[int, ...]]] = {
    "transpose": ((1, 1), (33, 31), (3, 70), (64, 96)),
    "reduction": ((1,), (31,), (1000,), (4099,)),
    "softmax": ((1, 1), (5, 31), (3, 1030), (130, 8), (7, 132)),
    "matmul": ((1, 1, 1), (33, 17, 5), (70, 66, 40), (65, 72, 144)),  # three steps of the deepest tile
    "attention": ((1, 1, 1, 1), (2, 33, 70, 40), (1, 65, 67, 17), (1, 3, 600, 8), (1, 64, 129, 64)),
}
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "small": {
        "transpose": (128, 128),
        "reduction": (32768,),
        "softmax": (128, 256),
        "matmul": (128, 128, 64),
        "attention": (2, 64, 128, 64),
    },
    "large": {
        "transpose": (512, 512),
        "reduction": (262144,),
        "softmax": (512, 1024),
        "matmul": (256, 256, 256),
        "attention": (4, 128, 256, 64),
    },
}
