// Softmax of x (rows, columns) over columns, fp32, any sizes: a warp a row, four warps a block.
//
// Numbers may be as large as 1e4. No shared memory: the lanes of a warp exchange by shuffles. Every lane of a warp must
// take part in a shuffle, also in rows that do not exist.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int WARPS = 4;

__global__ void __launch_bounds__(32 * WARPS) softmax(const float* x, float* y, int64_t rows, int64_t columns) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;  // the whole warp
  x += row * columns;
  y += row * columns;
  // write this
  float largest = -INFINITY;
  for (int64_t i = lane; i < columns; i += 32) largest = fmaxf(largest, x[i]);
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  float sum = 0.0f;
  for (int64_t i = lane; i < columns; i += 32) sum += expf(x[i] - largest);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  for (int64_t i = lane; i < columns; i += 32) y[i] = expf(x[i] - largest) / sum;
  // written
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, WARPS)));
  return static_cast<int>(launch(softmax, grid, dim3(32 * WARPS), 0, stream, x, y, rows, columns));
}
