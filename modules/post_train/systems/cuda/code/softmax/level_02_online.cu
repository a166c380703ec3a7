// The maximum and the sum come from one pass: a new maximum rescales the sum so far.
//
// With m the maximum and s = Σ exp(x − m) of the elements seen, a new x gives m' = max(m, x) and s' = s · exp(m − m') +
// exp(x − m')  (Milakov & Gimelshein 2018, arXiv:1805.02867). This is also the heart of FlashAttention. Two reads of
// the row instead of three; the addresses are as bad as before.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 128;

__global__ void __launch_bounds__(BLOCK_SIZE) softmax(const float* x, float* y, int64_t rows, int64_t columns) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * BLOCK_SIZE + threadIdx.x;
  if (row >= rows) return;
  x += row * columns;
  y += row * columns;
  float row_max = -INFINITY, row_sum = 0.0f;
  for (int64_t i = 0; i < columns; ++i) {
    const float v = x[i], new_max = fmaxf(row_max, v);
    const float rescale = __expf(row_max - new_max);
    row_sum = row_sum * rescale + __expf(v - new_max);
    row_max = new_max;
  }
  for (int64_t i = 0; i < columns; ++i) y[i] = __expf(x[i] - row_max) / row_sum;
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, BLOCK_SIZE)));
  return static_cast<int>(launch(softmax, grid, dim3(BLOCK_SIZE), 0, stream, x, y, rows, columns));
}
