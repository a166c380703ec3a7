// A thread computes 4 × 4 elements: eight values from shared memory serve sixteen multiply-adds.
//
// The block's tile grows to 64 × 64, which halves the traffic of A and B, with a quarter of the threads. Shared reads
// for a multiply-add fall from 2 to 1/2, and B's four come in one 8-byte load. A thread's rows lie 16 apart, so that
// the two rows which a warp reads at once are neighbors, in different banks; its columns are neighbors, for 16-byte
// stores.
#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int kTile = 64, kDeep = 16, kEach = 4, kSide = kTile / kEach, BLOCK_SIZE = kSide * kSide;
constexpr int kWide = 8;
using Group = Vector<bf16, kWide>;

__device__ __forceinline__ Group fetch(const bf16* x, int64_t row, int64_t rows, int64_t column, int64_t columns,
                                       bool aligned) {
  if (aligned && row < rows && column + kWide <= columns) {
    return load<bf16, kWide>(x + row * columns + column);
  }
  Group v;
  for (int j = 0; j < kWide; ++j) {
    v.at[j] = row < rows && column + j < columns ? x[row * columns + column + j] : from_float<bf16>(0.0f);
  }
  return v;
}

__global__ void __launch_bounds__(BLOCK_SIZE)
    matmul(const bf16* a, const bf16* b, float* c, int64_t m, int64_t n, int64_t k) {
  SHARED(Group, as, [kTile][kDeep / kWide]);
  SHARED(Group, bs, [kDeep][kTile / kWide]);
  const int64_t tiles = ceil_div(n, kTile), top = blockIdx.x / tiles * kTile, left = blockIdx.x % tiles * kTile;
  const int t = threadIdx.x, y = t / kSide, x = t % kSide * kEach;  // mine: rows y, y + 16, … and columns x … x + 3
  const bool a_aligned = are_aligned(a) && k % kWide == 0, b_aligned = are_aligned(b) && n % kWide == 0;
  float sum[kEach][kEach] = {};
  for (int64_t first = 0; first < k; first += kDeep) {
    if (t < BLOCK_SIZE / 2) {  // half of the threads fetch eight elements of A each, the others of B
      const int row = t / 2, at = t % 2;
      as[row][at] = fetch(a, top + row, m, first + at * kWide, k, a_aligned);
    } else {
      const int row = (t - BLOCK_SIZE / 2) / 8, at = t % 8;
      bs[row][at] = fetch(b, first + row, k, left + at * kWide, n, b_aligned);
    }
    __syncthreads();
    for (int i = 0; i < kDeep; ++i) {
      const auto from_b = load<bf16, kEach>(&bs[i][x / kWide].at[x % kWide]);
#pragma unroll
      for (int p = 0; p < kEach; ++p) {
        const float from_a = to_float(as[y + kSide * p][i / kWide].at[i % kWide]);
#pragma unroll
        for (int q = 0; q < kEach; ++q) sum[p][q] += from_a * to_float(from_b.at[q]);
      }
    }
    __syncthreads();
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
