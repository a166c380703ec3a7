// The tiles come in 16-byte loads, eight elements each: an eighth of the load and store instructions.
//
// 128 threads fetch the tile of A and 128 others that of B; the remaining 768 wait at the barrier. Sectors stay as they
// were, requests fall by eight. Where rows do not begin on 16 bytes the eight elements are read one by one.
#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int kTile = 32, kWide = 8, kLoaders = kTile * kTile / kWide;
using Group = Vector<bf16, kWide>;  // 16 bytes

// Elements [column, column + 8) of a row; what is outside the matrix is 0.
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

__global__ void __launch_bounds__(kTile* kTile)
    matmul(const bf16* a, const bf16* b, float* c, int64_t m, int64_t n, int64_t k) {
  SHARED(Group, as, [kTile][kTile / kWide]);
  SHARED(Group, bs, [kTile][kTile / kWide]);
  const int64_t tiles = ceil_div(n, kTile);
  const int x = threadIdx.x, y = threadIdx.y, t = y * kTile + x;
  const int64_t top = blockIdx.x / tiles * kTile, left = blockIdx.x % tiles * kTile;
  const int from = t % kLoaders / (kTile / kWide), at = t % (kTile / kWide);  // my group of a tile
  const bool a_aligned = are_aligned(a) && k % kWide == 0, b_aligned = are_aligned(b) && n % kWide == 0;
  float sum = 0.0f;
  for (int64_t first = 0; first < k; first += kTile) {
    if (t < kLoaders) {
      as[from][at] = fetch(a, top + from, m, first + at * kWide, k, a_aligned);
    } else if (t < 2 * kLoaders) {
      bs[from][at] = fetch(b, first + from, k, left + at * kWide, n, b_aligned);
    }
    __syncthreads();
    for (int i = 0; i < kTile; ++i) {
      sum += to_float(as[y][i / kWide].at[i % kWide]) * to_float(bs[i][x / kWide].at[x % kWide]);
    }
    __syncthreads();
  }
  if (top + y < m && left + x < n) c[(top + y) * n + left + x] = sum;
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(m, kTile) * ceil_div(n, kTile)));
  return static_cast<int>(launch(matmul, grid, dim3(kTile, kTile), 0, stream, static_cast<const bf16*>(a),
                                 static_cast<const bf16*>(b), c, m, n, k));
}
