// The transpose of x (rows, columns), fp32 → (columns, rows), any sizes.
//
// A block of 32 × 8 threads moves a tile of 32 × 32. Reads and writes of global memory are both of neighbors, and shared
// memory has no bank conflicts: at most 1.6 times the fewest sectors.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int TILE = 32, ROWS = 8;

__global__ void __launch_bounds__(TILE * ROWS) transpose(const float* x, float* y, int64_t rows, int64_t columns) {
  SHARED(float, tile, [TILE][TILE + 1]);
  const int64_t left = static_cast<int64_t>(blockIdx.x) * TILE, top = static_cast<int64_t>(blockIdx.y) * TILE;
  // write this
  for (int i = threadIdx.y; i < TILE; i += ROWS) {
    const int64_t row = top + i, column = left + threadIdx.x;
    if (row < rows && column < columns) tile[i][threadIdx.x] = x[row * columns + column];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < TILE; i += ROWS) {
    const int64_t row = left + i, column = top + threadIdx.x;  // of the result
    if (row < columns && column < rows) y[row * rows + column] = tile[threadIdx.x][i];
  }
  // written
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(columns, TILE)), static_cast<unsigned>(ceil_div(rows, TILE)));
  return static_cast<int>(launch(transpose, grid, dim3(TILE, ROWS), 0, stream, x, y, rows, columns));
}
