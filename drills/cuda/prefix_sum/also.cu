#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int BLOCK = 256;

__global__ void __launch_bounds__(BLOCK) scan(const float* x, float* y, int64_t columns) {
  SHARED(float, sums, [2][BLOCK]);  // Hillis and Steele, in two buffers
  const int t = threadIdx.x;
  sums[0][t] = t < columns ? x[blockIdx.x * columns + t] : 0.0f;
  int now = 0;
  for (int step = 1; step < BLOCK; step *= 2) {
    __syncthreads();
    sums[1 - now][t] = sums[now][t] + (t >= step ? sums[now][t - step] : 0.0f);
    now = 1 - now;
  }
  if (t < columns) y[blockIdx.x * columns + t] = sums[now][t];
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  return static_cast<int>(launch(scan, dim3(static_cast<unsigned>(rows)), dim3(BLOCK), 0, stream, x, y, columns));
}
