// A warp takes a row: its lanes read neighboring elements, and shuffles join their maxima and sums.
//
// One request of 32 lanes is now 128 bytes in a row: 4 sectors, all of them used, where the levels before touched 32.
// Each lane keeps (m, s) of its own elements; five exchanges (lane ^ 16, 8, 4, 2, 1) join the pairs of all lanes,
// without shared memory and without a barrier.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int kWarps = 4;  // of a block

__global__ void __launch_bounds__(kWarps * 32) softmax(const float* x, float* y, int64_t rows, int64_t columns) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;  // the whole warp leaves
  x += row * columns;
  y += row * columns;
  float row_max = -INFINITY, row_sum = 0.0f;
  for (int64_t i = lane; i < columns; i += 32) {
    const float v = x[i], new_max = fmaxf(row_max, v);
    row_sum = row_sum * __expf(row_max - new_max) + __expf(v - new_max);
    row_max = new_max;
  }
  for (int bits = 16; bits; bits /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, row_max, bits),
                other_sum = __shfl_xor_sync(0xffffffffu, row_sum, bits);
    const float new_max = fmaxf(row_max, other);
    if (new_max == -INFINITY) continue;  // neither lane has an element
    const float rescale = __expf(row_max - new_max);
    row_sum = row_sum * rescale + other_sum * __expf(other - new_max);
    row_max = new_max;
  }
  for (int64_t i = lane; i < columns; i += 32) y[i] = __expf(x[i] - row_max) / row_sum;
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kWarps)));
  return static_cast<int>(launch(softmax, grid, dim3(kWarps * 32), 0, stream, x, y, rows, columns));
}
