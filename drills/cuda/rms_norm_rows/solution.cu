// RMSNorm of x (rows, columns) with weights w (columns) in fp32: y = x / √(mean(x²) + eps) · w, eps = 1e-5.
//
// A block of 128 threads a row, any number of columns. The sum of squares is in fp32; rows of zeros give zeros.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int BLOCK = 128;
constexpr float EPS = 1e-5f;

__global__ void __launch_bounds__(BLOCK) rms_norm(const float* x, const float* w, float* y, int64_t columns) {
  SHARED(float, part, [BLOCK / 32]);
  x += blockIdx.x * columns;
  y += blockIdx.x * columns;
  const int t = threadIdx.x;
  // write this
  float sum = 0.0f;
  for (int64_t i = t; i < columns; i += BLOCK) sum += x[i] * x[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (t % 32 == 0) part[t / 32] = sum;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < BLOCK / 32; ++warp) total += part[warp];
  const float scale = 1.0f / sqrtf(total / static_cast<float>(columns) + EPS);
  for (int64_t i = t; i < columns; i += BLOCK) y[i] = x[i] * scale * w[i];
  // written
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* x, const float* w, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  return static_cast<int>(
      launch(rms_norm, dim3(static_cast<unsigned>(rows)), dim3(BLOCK), 0, stream, x, w, y, columns));
}
