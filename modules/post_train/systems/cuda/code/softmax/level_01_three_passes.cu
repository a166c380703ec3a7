// One thread takes one row and reads it three times: for the maximum, for the sum, for the result.
//
// y[r][c] = exp(x[r][c] − max_r) / Σ_c exp(x[r][c] − max_r); x and y (rows, columns) fp32, row-major. Without the
// maximum exp overflows at 89. Neighboring lanes read addresses that lie a whole row apart: a request of a warp
// touches 32 sectors of 32 bytes and uses 4 bytes of each.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) softmax(const float* x, float* y, int64_t rows, int64_t columns) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  x += row * columns;
  y += row * columns;
  float most = -INFINITY;
  for (int64_t i = 0; i < columns; ++i) most = fmaxf(most, x[i]);
  float sum = 0.0f;
  for (int64_t i = 0; i < columns; ++i) sum += __expf(x[i] - most);
  for (int64_t i = 0; i < columns; ++i) y[i] = __expf(x[i] - most) / sum;
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kThreads)));
  return static_cast<int>(launch(softmax, grid, dim3(kThreads), 0, stream, x, y, rows, columns));
}
