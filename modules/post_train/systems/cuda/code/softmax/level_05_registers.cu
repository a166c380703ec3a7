// The row stays in registers between the passes: it is read once and written once, the least there can be.
//
// A lane keeps up to 8 groups of four elements, so a warp holds rows of up to 1024; longer ones are read again. With
// all of the row at hand there is no need for the online sum: one exchange for the maximum, one for the sum.
#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int kWarps = 4, kWide = 4, kGroups = 8;
constexpr int64_t kHeld = 32 * kWide * kGroups;

using Group = Vector<float, kWide>;

// Four elements from `i`; those past the end are −∞, which neither the maximum nor the sum sees.
__device__ __forceinline__ Group fetch(const float* x, int64_t i, int64_t columns, bool aligned) {
  if (aligned && i + kWide <= columns) return load<float, kWide>(x + i);
  Group v;
#pragma unroll
  for (int j = 0; j < kWide; ++j) v.at[j] = i + j < columns ? x[i + j] : -INFINITY;
  return v;
}
__device__ __forceinline__ void put(float* y, int64_t i, int64_t columns, bool aligned, const Group& v) {
  if (aligned && i + kWide <= columns) return store(y + i, v);
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    if (i + j < columns) y[i + j] = v.at[j];
  }
}

__global__ void __launch_bounds__(kWarps * 32) softmax(const float* x, float* y, int64_t rows, int64_t columns) {
  const int64_t first = threadIdx.x % 32 * kWide, step = 32 * kWide;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  x += row * columns;
  y += row * columns;
  const bool aligned = are_aligned(x, y);
  Group held[kGroups];
  float row_max = -INFINITY, row_sum = 0.0f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    held[g] = fetch(x, first + g * step, columns, aligned);
    for (float v : held[g].at) row_max = fmaxf(row_max, v);
  }
  for (int64_t i = first + kHeld; i < columns; i += step) {
    for (float v : fetch(x, i, columns, aligned).at) row_max = fmaxf(row_max, v);
  }
  row_max = warp_max(row_max);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    for (float& v : held[g].at) row_sum += v = __expf(v - row_max);
  }
  for (int64_t i = first + kHeld; i < columns; i += step) {
    for (float v : fetch(x, i, columns, aligned).at) row_sum += __expf(v - row_max);
  }
  row_sum = warp_sum(row_sum);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    for (float& v : held[g].at) v /= row_sum;
    put(y, first + g * step, columns, aligned, held[g]);
  }
  for (int64_t i = first + kHeld; i < columns; i += step) {
    Group v = fetch(x, i, columns, aligned);
    for (float& e : v.at) e = __expf(e - row_max) / row_sum;
    put(y, i, columns, aligned, v);
  }
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kWarps)));
  return static_cast<int>(launch(softmax, grid, dim3(kWarps * 32), 0, stream, x, y, rows, columns));
}
