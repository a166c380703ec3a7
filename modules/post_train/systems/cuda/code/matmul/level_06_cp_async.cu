// The next tiles are copied while the present ones are multiplied: cp.async, two buffers.
//
// cp.async moves 16 bytes from global to shared memory past the registers and returns at once. A group is committed for
// each step; waiting until at most one group is under way means that the older one has arrived, and the barrier makes
// it visible to all. Traffic is as before: what this buys is time, which an emulator cannot show.
#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int kTile = 64, kDeep = 16, kEach = 4, kSide = kTile / kEach, BLOCK_SIZE = kSide * kSide;
constexpr int kWide = 8;
using Group = Vector<bf16, kWide>;

// Eight elements of a row. Aligned groups are wholly inside the matrix or wholly outside, where they become 0.
__device__ __forceinline__ void fetch(Group& to, const bf16* x, int64_t row, int64_t rows, int64_t column,
                                      int64_t columns, bool aligned) {
  if (aligned) {
    const bool inside = row < rows && column < columns;
    ptx::cp_async16(&to, inside ? x + row * columns + column : x, inside);
    return;
  }
  for (int j = 0; j < kWide; ++j) {
    to.at[j] = row < rows && column + j < columns ? x[row * columns + column + j] : from_float<bf16>(0.0f);
  }
}

__global__ void __launch_bounds__(BLOCK_SIZE)
    matmul(const bf16* a, const bf16* b, float* c, int64_t m, int64_t n, int64_t k) {
  SHARED(Group, as, [2][kTile][kDeep / kWide]);
  SHARED(Group, bs, [2][kDeep][kTile / kWide]);
  const int64_t tiles = ceil_div(n, kTile), top = blockIdx.x / tiles * kTile, left = blockIdx.x % tiles * kTile;
  const int t = threadIdx.x, y = t / kSide, x = t % kSide * kEach;
  const bool a_aligned = are_aligned(a) && k % kWide == 0, b_aligned = are_aligned(b) && n % kWide == 0;
  const int64_t steps = ceil_div(k, kDeep);
  const auto fetch_step = [&](int64_t step) {
    const int buffer = step % 2;
    if (t < BLOCK_SIZE / 2) {
      const int row = t / 2, at = t % 2;
      fetch(as[buffer][row][at], a, top + row, m, step * kDeep + at * kWide, k, a_aligned);
    } else {
      const int row = (t - BLOCK_SIZE / 2) / 8, at = t % 8;
      fetch(bs[buffer][row][at], b, step * kDeep + row, k, left + at * kWide, n, b_aligned);
    }
  };
  float sum[kEach][kEach] = {};
  fetch_step(0);
  ptx::cp_async_commit();
  for (int64_t step = 0; step < steps; ++step) {
    if (step + 1 < steps) fetch_step(step + 1);
    ptx::cp_async_commit();  // empty in the last step, so that the count below holds there too
    ptx::cp_async_wait<1>();
    __syncthreads();
    const int buffer = step % 2;
    for (int i = 0; i < kDeep; ++i) {
      const auto from_b = load<bf16, kEach>(&bs[buffer][i][x / kWide].at[x % kWide]);
#pragma unroll
      for (int p = 0; p < kEach; ++p) {
        const float from_a = to_float(as[buffer][y + kSide * p][i / kWide].at[i % kWide]);
#pragma unroll
        for (int q = 0; q < kEach; ++q) sum[p][q] += from_a * to_float(from_b.at[q]);
      }
    }
    __syncthreads();  // before this buffer is filled again
  }
  for (int p = 0; p < kEach; ++p) {
    const int64_t row = top + y + kSide * p;
    float* to = c + row * n + left + x;
    if (row < m && left + x + kEach <= n && are_aligned(to)) {
      store(to, Vector<float, kEach>{{sum[p][0], sum[p][1], sum[p][2], sum[p][3]}});
    } else {
      for (int q = 0; row < m && q < kEach && left + x + q < n; ++q) to[q] = sum[p][q];
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
