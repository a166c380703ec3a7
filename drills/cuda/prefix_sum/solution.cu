// The inclusive prefix sums of x (rows, columns) along columns, fp32, at most 256 columns: y[i] = x[0] + … + x[i].
//
// A block of 256 threads a row, one thread a column. Within a warp by shuffles, across warps through shared memory; a loop
// over all columns in one thread is too slow: at most 20 additions follow each other.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int BLOCK = 256;

__global__ void __launch_bounds__(BLOCK) scan(const float* x, float* y, int64_t columns) {
  SHARED(float, totals, [BLOCK / 32]);
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int64_t at = blockIdx.x * columns + t;
  // write this
  float sum = t < columns ? x[at] : 0.0f;
  for (int step = 1; step < 32; step *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == 31) totals[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += totals[w];
  if (t < columns) y[at] = sum;
  // written
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  return static_cast<int>(launch(scan, dim3(static_cast<unsigned>(rows)), dim3(BLOCK), 0, stream, x, y, columns));
}
