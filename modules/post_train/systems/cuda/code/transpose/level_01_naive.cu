// One thread moves one element: the reads are in a row, the writes lie a column of the result apart.
//
// y[c][r] = x[r][c]; x (rows, columns), y (columns, rows), fp32. It is all memory: 8 bytes an element, no arithmetic. A
// warp's store touches 32 sectors and fills 4 bytes of each.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int kTile = 32;

__global__ void __launch_bounds__(kTile* kTile) transpose(const float* x, float* y, int64_t rows, int64_t columns) {
  const int64_t tiles = ceil_div(columns, kTile);
  const int64_t r = blockIdx.x / tiles * kTile + threadIdx.y, c = blockIdx.x % tiles * kTile + threadIdx.x;
  if (r < rows && c < columns) y[c * rows + r] = x[r * columns + c];
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kTile) * ceil_div(columns, kTile)));
  return static_cast<int>(launch(transpose, grid, dim3(kTile, kTile), 0, stream, x, y, rows, columns));
}
