import triton
import triton.language as tl


@triton.jit
def matmul_kernel(a, b, c, m, n, k, am, ak, bk, bn, TILES: tl.constexpr):
    tile = tl.program_id(0)
    columns = tl.cdiv(n, TILES)
    i = (tile // columns) * TILES + tl.arange(0, TILES)[:, None]
    j = (tile % columns) * TILES + tl.arange(0, TILES)[None, :]
    total = tl.zeros([TILES, TILES], tl.float32)
    for l in range(k):
        x = tl.load(a + i * am + l * ak, mask=i < m, other=0.0).to(tl.float32)
        y = tl.load(b + l * bk + j * bn, mask=j < n, other=0.0).to(tl.float32)
        total += x * y
    tl.store(c + i * n + j, total, mask=(i < m) & (j < n))


def matmul(a, b):
    (m, k), (_, n) = a.shape, b.shape
    c = a.new_empty(m, n)
    grid = (triton.cdiv(m, 16) * triton.cdiv(n, 16),)
    matmul_kernel[grid](a, b, c, m, n, k, a.stride(0), a.stride(1), b.stride(0), b.stride(1), 16)
    return c
