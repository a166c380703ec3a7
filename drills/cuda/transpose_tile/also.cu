#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int TILE = 32, ROWS = 8;

__global__ void __launch_bounds__(TILE * ROWS) transpose(const float* x, float* y, int64_t rows, int64_t columns) {
  SHARED(float, tile, [TILE * TILE]);
  const int64_t left = static_cast<int64_t>(blockIdx.x) * TILE, top = static_cast<int64_t>(blockIdx.y) * TILE;
  const int t = threadIdx.x;
  for (int i = threadIdx.y; i < TILE; i += ROWS) {
    if (top + i < rows && left + t < columns) tile[i * TILE + (t ^ i)] = x[(top + i) * columns + left + t];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < TILE; i += ROWS) {
    if (left + i < columns && top + t < rows) y[(left + i) * rows + top + t] = tile[t * TILE + (i ^ t)];
  }
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(columns, TILE)), static_cast<unsigned>(ceil_div(rows, TILE)));
  return static_cast<int>(launch(transpose, grid, dim3(TILE, ROWS), 0, stream, x, y, rows, columns));
}
