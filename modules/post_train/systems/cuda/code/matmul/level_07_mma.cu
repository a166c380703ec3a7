// Tensor cores: ldmatrix brings fragments from swizzled shared memory, one mma is 16 × 8 × 16 multiply-adds.
//
// Four warps share a 64 × 64 tile, 32 × 32 each, in steps of 64. ldmatrix reads eight rows of 16 bytes at a time; the
// rows lie 128 bytes apart, which is one bank for all eight, so row r keeps its chunk c (16 bytes) at c XOR r % 8: no
// conflict, no padding. B is stored as it comes, (k, n), and .trans turns it on the way to the registers.
#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int kTile = 64, BLOCK_SIZE = 128, kWide = 8, kChunks = kTile / kWide;
using Chunk = Vector<bf16, kWide>;

// Where chunk `chunk` of row `row` of a 64 × 64 tile lies.
__device__ __forceinline__ int place(int row, int chunk) { return row * kChunks + (chunk ^ row % 8); }

// A 64 × 64 tile at (top, left); what is outside the matrix becomes 0.
__device__ __forceinline__ void fetch(Chunk* tile, const bf16* x, int64_t top, int64_t rows, int64_t left,
                                      int64_t columns, bool aligned) {
  for (int i = threadIdx.x; i < kTile * kChunks; i += BLOCK_SIZE) {
    const int row = i / kChunks, chunk = i % kChunks;
    Chunk& to = tile[place(row, chunk)];
    const int64_t r = top + row, column = left + chunk * kWide;
    if (aligned) {
      const bool inside = r < rows && column < columns;
      ptx::cp_async16(&to, inside ? x + r * columns + column : x, inside);
    } else {
      for (int j = 0; j < kWide; ++j) {
        to.at[j] = r < rows && column + j < columns ? x[r * columns + column + j] : from_float<bf16>(0.0f);
      }
    }
  }
}

__global__ void __launch_bounds__(BLOCK_SIZE)
    matmul(const bf16* a, const bf16* b, float* c, int64_t m, int64_t n, int64_t k) {
  SHARED(Chunk, as, [2][kTile * kChunks]);
  SHARED(Chunk, bs, [2][kTile * kChunks]);
  const int64_t tiles = ceil_div(n, kTile), top = blockIdx.x / tiles * kTile, left = blockIdx.x % tiles * kTile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, y = warp / 2 * 32, x = warp % 2 * 32;
  const bool a_aligned = are_aligned(a) && k % kWide == 0, b_aligned = are_aligned(b) && n % kWide == 0;
  const int64_t steps = ceil_div(k, kTile);
  const auto fetch_step = [&](int64_t step) {
    fetch(as[step % 2], a, top, m, step * kTile, k, a_aligned);
    fetch(bs[step % 2], b, step * kTile, k, left, n, b_aligned);
  };
  float sum[2][4][4] = {};  // 2 × 4 fragments of 16 × 8
  fetch_step(0);
  ptx::cp_async_commit();
  for (int64_t step = 0; step < steps; ++step) {
    if (step + 1 < steps) fetch_step(step + 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    const Chunk *at = as[step % 2], *bt = bs[step % 2];
#pragma unroll
    for (int i = 0; i < kTile; i += 16) {
      unsigned from_a[2][4], from_b[2][4];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int row = y + 16 * p + lane % 16, chunk = i / kWide + lane / 16;
        ptx::ldmatrix_x4(from_a[p], at + place(row, chunk));
      }
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        ptx::ldmatrix_x4_trans(from_b[q], bt + place(i + lane % 16, x / kWide + 2 * q + lane / 16));
      }
#pragma unroll
      for (int p = 0; p < 2; ++p) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const unsigned b0 = from_b[q / 2][q % 2 * 2], b1 = from_b[q / 2][q % 2 * 2 + 1];
          ptx::mma_16x8x16<bf16>(sum[p][q], from_a[p], b0, b1);
        }
      }
    }
    __syncthreads();  // before this buffer is filled again
  }
  for (int p = 0; p < 2; ++p) {
    for (int q = 0; q < 4; ++q) {
      for (int half = 0; half < 2; ++half) {  // row lane / 4, then row lane / 4 + 8: two neighbors each
        const int64_t row = top + y + 16 * p + lane / 4 + 8 * half, column = left + x + 8 * q + lane % 4 * 2;
        float* to = c + row * n + column;
        if (row < m && column + 1 < n && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
          store(to, Vector<float, 2>{{sum[p][q][2 * half], sum[p][q][2 * half + 1]}});
        } else {
          for (int i = 0; row < m && i < 2 && column + i < n; ++i) to[i] = sum[p][q][2 * half + i];
        }
      }
    }
  }
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(m, kTile) * ceil_div(n, kTile)));
  return static_cast<int>(launch(matmul, grid, dim3(BLOCK_SIZE), 0, stream, static_cast<const bf16*>(a),
                                 static_cast<const bf16*>(b), c, m, n, k));
}
