"""The weights of quantized_linear as a GPU's tensor cores take them: tiles of 32 rows × 32 terms, each lane's codes of
a tile together (Marlin's idea, Frantar et al. 2024, arXiv:2408.11743; csrc/cuda/quantized_linear.cu says why).

Row 32 P + 16 i + 8 a + g and term 32 T + 16 s + 8 b + 2 t + e of W are element (i, s, r = a + 2 b, e) of lane 4 g + t
in tile T of panel P: with the rows as its left operand, mma m16n8k16 number i, s wants them in half e of register r.
A lane has 16 bytes a chunk, a chunk's 32 lanes follow each other, and codes are (panels, tiles, chunks, 32, elements):

    int4    1 chunk, word (i, s), half byte r + 4 e: three shifts and masks make a register of each pair e
    nf4     1 chunk, word (i, s), half byte 2 r + e: four of them select bytes of a table
    int8    2 chunks i, word (s, b), byte a + 2 e
    bf16    4 chunks (i, s), element (r, e)
    fp32    8 chunks (i, s, b), element (a, e)

Scales are (panels, groups, 8, 4), or (…, 4, 2) with each minimum behind its scale: of lane 4 g + t's rows g + 8 j. One
scale a row is (panels · 32,), in order. Rows and terms are padded with zeros to whole tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PANEL, TILE = 32, 32
AXES = "PiagTsbte"  # of W's rows and terms as above
ORDER = {  # of memory; the last axis of 4-bit codes is that of a byte's halves
    "int4": "PTgtiseba",
    "nf4": "PTgtisbae",
    "int8": "PTigtsbea",
    "bf16": "PTisgtbae",
    "fp32": "PTisbgtae",
}
CHUNKS = {"int4": 1, "nf4": 1, "int8": 2, "bf16": 4, "fp32": 8}


def pack(codes: Tensor, format: str) -> Tensor:
    """(N, K), one code an element → (panels, tiles, chunks, 32, what 16 bytes hold)."""
    n, k = codes.shape
    codes = F.pad(codes, (0, -k % TILE, 0, -n % PANEL))
    panels, tiles = codes.shape[0] // PANEL, codes.shape[1] // TILE
    split = codes.view(panels, 2, 2, 8, tiles, 2, 2, 4, 2)
    ordered = split.permute([AXES.index(axis) for axis in ORDER[format]])
    ordered = ordered.reshape(panels, tiles, CHUNKS[format], 32, TILE // CHUNKS[format])
    return ordered[..., ::2] | ordered[..., 1::2] << 4 if format in ("int4", "nf4") else ordered.contiguous()


def unpack(packed: Tensor, format: str, n: int, k: int) -> Tensor:
    """What `pack` was given."""
    if format in ("int4", "nf4"):
        packed = torch.stack([packed & 15, packed >> 4], -1)
    order, panels, tiles = ORDER[format], packed.shape[0], packed.shape[1]
    sizes = {"P": panels, "T": tiles, "g": 8, "t": 4}
    split = packed.reshape([sizes.get(axis, 2) for axis in order])
    return (
        split.permute([order.index(axis) for axis in AXES]).reshape(panels * PANEL, tiles * TILE)[:n, :k].contiguous()
    )


def pack_scales(scale: Tensor, minimum: Tensor | None, k: int, group: int) -> Tensor:
    """(N, groups) of a scale and, if there are any, of minima; group 0: one scale a row."""
    rows = -scale.shape[0] % PANEL
    if group == 0:
        return F.pad(scale[:, 0], (0, rows)) if scale.shape[1] else scale.new_zeros(scale.shape[0] + rows)
    groups = groups_of(k, group)

    def by_lane(t: Tensor) -> Tensor:
        padded = F.pad(t, (0, groups - t.shape[1], 0, rows))
        return padded.view(padded.shape[0] // PANEL, 4, 8, groups).permute(0, 3, 2, 1)

    parts = by_lane(scale)
    return (parts if minimum is None else torch.stack([parts, by_lane(minimum)], -1)).contiguous()


def unpack_scales(packed: Tensor, n: int, k: int, group: int) -> tuple[Tensor, Tensor | None]:
    """What `pack_scales` was given."""
    if group == 0:
        return packed[:n, None].expand(n, 1 if k else 0).contiguous(), None

    def by_row(t: Tensor) -> Tensor:
        return t.permute(0, 3, 2, 1).reshape(t.shape[0] * PANEL, t.shape[1])[:n, : -(-k // group)].contiguous()

    return (by_row(packed[..., 0]), by_row(packed[..., 1])) if packed.dim() == 5 else (by_row(packed), None)


def groups_of(k: int, group: int) -> int:
    """Groups of a row that is padded to whole tiles."""
    padded = k + -k % TILE
    return -(-padded // group)
