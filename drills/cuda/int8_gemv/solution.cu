// y[r] = scale[r] · Σ_i w[r, i] · x[i]: w (rows, columns) int8, scale (rows) and x (columns) fp32 → y (rows) fp32.
//
// A warp a row, four warps a block; columns is a multiple of 4. Read the weights four at a time (one 32-bit word a lane):
// a request of a warp brings 128 of them. The sum is in fp32.
#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int WARPS = 4;

__global__ void __launch_bounds__(32 * WARPS)
    gemv(const int8_t* w, const float* scale, const float* x, float* y, int64_t rows, int64_t columns) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;  // the whole warp
  // write this
  const int* own = reinterpret_cast<const int*>(w + row * columns);
  float sum = 0.0f;
  for (int64_t i = lane; i < columns / 4; i += 32) {
    const int four = own[i];
    for (int j = 0; j < 4; ++j) sum += static_cast<float>(static_cast<int8_t>(four >> 8 * j)) * x[4 * i + j];
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lane == 0) y[row] = sum * scale[row];
  // written
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const int8_t* w, const float* scale, const float* x, float* y, int64_t rows, int64_t columns,
                      void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, WARPS)));
  return static_cast<int>(launch(gemv, grid, dim3(32 * WARPS), 0, stream, w, scale, x, y, rows, columns));
}
