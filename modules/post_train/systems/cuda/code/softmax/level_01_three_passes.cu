// One thread takes one row and reads it three times: for the maximum, for the sum, for the result.
//
// y[r][c] = exp(x[r][c] − max_r) / Σ_c exp(x[r][c] − max_r); x and y (rows, columns) fp32, row-major. Without the
// maximum exp overflows at 89. Neighboring lanes read addresses that lie a whole row apart: a request of a warp
// touches 32 sectors of 32 bytes and uses 4 bytes of each.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 128;

__global__ void __launch_bounds__(BLOCK_SIZE) softmax(const float* x, float* y, int64_t rows, int64_t columns) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * BLOCK_SIZE + threadIdx.x;
  if (row >= rows) return;
  x += row * columns;
  y += row * columns;
  float row_max = -INFINITY;
  for (int64_t i = 0; i < columns; ++i) row_max = fmaxf(row_max, x[i]);
  float row_sum = 0.0f;
  for (int64_t i = 0; i < columns; ++i) row_sum += __expf(x[i] - row_max);
  for (int64_t i = 0; i < columns; ++i) y[i] = __expf(x[i] - row_max) / row_sum;
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, BLOCK_SIZE)));
  return static_cast<int>(launch(softmax, grid, dim3(BLOCK_SIZE), 0, stream, x, y, rows, columns));
}
