#include "device/launch.cuh"

namespace finetune {
namespace {

__global__ void add(const float* a, const float* b, float* y, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) y[i] = a[i] + b[i];
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* a, const float* b, float* y, int64_t n, void* stream) {
  using namespace finetune;
  return static_cast<int>(launch(add, dim3(2), dim3(256), 0, stream, a, b, y, n));
}
