// The k largest numbers of each row of x (rows, columns), fp32, 1 ≤ k ≤ columns ≤ 256 → values (rows, k) and their
// columns (rows, k) int32, largest first; of equal numbers the lower column first.
//
// A warp a row: lane l holds the columns l, l + 32, … (at most eight) in registers. k rounds, each with one reduction over
// the warp of (number, column).
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int WARPS = 4, EACH = 8;

__global__ void __launch_bounds__(32 * WARPS)
    top_k(const float* x, float* values, int* indices, int64_t rows, int columns, int k) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;  // the whole warp
  float own[EACH];
  for (int i = 0; i < EACH; ++i) own[i] = lane + 32 * i < columns ? x[row * columns + lane + 32 * i] : -INFINITY;
  unsigned taken = 0;  // bit i: own[i] was given out
  // write this
  for (int round = 0; round < k; ++round) {
    float best = -INFINITY;
    int at = columns;
    for (int i = 0; i < EACH; ++i) {
      const int column = lane + 32 * i;
      if (column < columns && !(taken >> i & 1) && (at == columns || own[i] > best)) {
        best = own[i];
        at = column;
      }
    }
    for (int step = 16; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, best, step);
      const int where = __shfl_xor_sync(0xffffffffu, at, step);
      if (where < columns && (at == columns || other > best || (other == best && where < at))) {
        best = other;
        at = where;
      }
    }
    if (at % 32 == lane) taken |= 1u << at / 32;
    if (lane == 0) {
      values[row * k + round] = best;
      indices[row * k + round] = at;
    }
  }
  // written
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* x, float* values, int* indices, int64_t rows, int64_t columns, int64_t k,
                      void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, WARPS)));
  return static_cast<int>(launch(top_k, grid, dim3(32 * WARPS), 0, stream, x, values, indices, rows,
                                 static_cast<int>(columns), static_cast<int>(k)));
}
