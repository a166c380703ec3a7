#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int BLOCK = 128;

__global__ void __launch_bounds__(BLOCK) rms_norm(const float* x, const float* w, float* y, int64_t columns) {
  SHARED(float, part, [BLOCK]);
  const int t = threadIdx.x;
  part[t] = 0.0f;
  for (int64_t i = t; i < columns; i += BLOCK) {
    const float v = x[blockIdx.x * columns + i];
    part[t] += v * v;
  }
  for (int step = BLOCK / 2; step > 0; step /= 2) {
    __syncthreads();
    if (t < step) part[t] += part[t + step];
  }
  __syncthreads();
  const float root = sqrtf(part[0] / static_cast<float>(columns) + 1e-5f);
  for (int64_t i = t; i < columns; i += BLOCK) y[blockIdx.x * columns + i] = x[blockIdx.x * columns + i] / root * w[i];
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* x, const float* w, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  return static_cast<int>(
      launch(rms_norm, dim3(static_cast<unsigned>(rows)), dim3(BLOCK), 0, stream, x, w, y, columns));
}
