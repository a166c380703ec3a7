#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int WARPS = 4;

__global__ void __launch_bounds__(32 * WARPS)
    gemv(const int8_t* w, const float* scale, const float* x, float* y, int64_t rows, int64_t columns) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  float sum = 0.0f;
  for (int64_t i = 4 * lane; i < columns; i += 128) {
    const Vector<int8_t, 4> four = load<int8_t, 4>(w + row * columns + i);
    for (int j = 0; j < 4; ++j) sum += to_float(four.at[j]) * x[i + j];
  }
  sum *= scale[row];
  for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lane == 0) y[row] = sum;
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const int8_t* w, const float* scale, const float* x, float* y, int64_t rows, int64_t columns,
                      void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, WARPS)));
  return static_cast<int>(launch(gemv, grid, dim3(32 * WARPS), 0, stream, w, scale, x, y, rows, columns));
}
