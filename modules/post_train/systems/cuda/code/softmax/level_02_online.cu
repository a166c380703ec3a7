// The maximum and the sum come from one pass: a new maximum rescales the sum so far.
//
// With m the maximum and s = Σ exp(x − m) of the elements seen, a new x gives m' = max(m, x) and s' = s · exp(m − m') +
// exp(x − m')  (Milakov & Gimelshein 2018, arXiv:1805.02867). This is also the heart of FlashAttention. Two reads of
// the row instead of three; the addresses are as bad as before.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) softmax(const float* x, float* y, int64_t rows, int64_t columns) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  x += row * columns;
  y += row * columns;
  float most = -INFINITY, sum = 0.0f;
  for (int64_t i = 0; i < columns; ++i) {
    const float v = x[i], larger = fmaxf(most, v);
    const float rescale = __expf(most - larger);
    sum = sum * rescale + __expf(v - larger);
    most = larger;
  }
  for (int64_t i = 0; i < columns; ++i) y[i] = __expf(x[i] - most) / sum;
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kThreads)));
  return static_cast<int>(launch(softmax, grid, dim3(kThreads), 0, stream, x, y, rows, columns));
}
