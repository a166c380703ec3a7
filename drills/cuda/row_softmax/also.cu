#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int WARPS = 4;

__global__ void __launch_bounds__(32 * WARPS) softmax(const float* x, float* y, int64_t rows, int64_t columns) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  float m = -INFINITY, s = 0.0f;  // online: the largest so far, and the sum next to it
  for (int64_t i = lane; i < columns; i += 32) {
    const float v = x[row * columns + i], larger = fmaxf(m, v);
    s = s * expf(m - larger) + expf(v - larger);
    m = larger;
  }
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, m, step), sum = __shfl_xor_sync(0xffffffffu, s, step);
    const float larger = fmaxf(m, other);
    if (larger > -INFINITY) s = s * expf(m - larger) + sum * expf(other - larger);
    m = larger;
  }
  for (int64_t i = lane; i < columns; i += 32) y[row * columns + i] = expf(x[row * columns + i] - m) / s;
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, WARPS)));
  return static_cast<int>(launch(softmax, grid, dim3(32 * WARPS), 0, stream, x, y, rows, columns));
}
