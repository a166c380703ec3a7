// One column of padding: element (i, j) lies in bank (33 · i + j) % 32, so a column is spread over all banks.
//
// A row of the tile takes 33 words. Column j of row i is in bank (i + j) % 32: 32 lanes, 32 banks, one wavefront. It
// costs 128 bytes of shared memory a tile.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int kTile = 32, kRows = 8;  // a thread moves kTile / kRows elements

__global__ void __launch_bounds__(kTile* kRows) transpose(const float* x, float* y, int64_t rows, int64_t columns) {
  SHARED(float, tile, [kTile * (kTile + 1)]);
  const int64_t tiles = ceil_div(columns, kTile);
  const int64_t r = blockIdx.x / tiles * kTile, c = blockIdx.x % tiles * kTile;
  const int lane = threadIdx.x, width = kTile + 1;
  for (int i = threadIdx.y; i < kTile; i += kRows) {
    if (r + i < rows && c + lane < columns) tile[i * width + lane] = x[(r + i) * columns + c + lane];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTile; i += kRows) {
    if (c + i < columns && r + lane < rows) {
      y[(c + i) * rows + r + lane] = tile[lane * width + i];
    }
  }
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kTile) * ceil_div(columns, kTile)));
  return static_cast<int>(launch(transpose, grid, dim3(kTile, kRows), 0, stream, x, y, rows, columns));
}
