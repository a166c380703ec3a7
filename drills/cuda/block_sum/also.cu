#include "device/launch.cuh"

namespace finetune {
namespace {

__global__ void __launch_bounds__(256) row_sum(const float* x, float* sum, int64_t columns) {
  SHARED(float, part, [8]);
  const int t = threadIdx.x;
  float own = 0.0f;
  for (int64_t i = t; i < columns; i += blockDim.x) own += x[blockIdx.x * columns + i];
  for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(0xffffffffu, own, step);
  if (t % 32 == 0) part[t / 32] = own;
  __syncthreads();
  if (t == 0) {
    float total = 0.0f;
    for (int w = 0; w < 8; ++w) total += part[w];
    sum[blockIdx.x] = total;
  }
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* x, float* sum, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  return static_cast<int>(launch(row_sum, dim3(static_cast<unsigned>(rows)), dim3(256), 0, stream, x, sum, columns));
}
