// A tile of 32 × 32 goes through shared memory: reads and writes of global memory are both in a row.
//
// The turn happens in shared memory, where a column has no sectors but has banks: element (i, j) lies in bank (32 · i +
// j) % 32 = j, so the 32 lanes that read column j all want one bank and are served one after another: 32 wavefronts
// where one would do.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int kTile = 32, kRows = 8;  // a thread moves kTile / kRows elements

__global__ void __launch_bounds__(kTile* kRows) transpose(const float* x, float* y, int64_t rows, int64_t columns) {
  SHARED(float, tile, [kTile][kTile]);
  const int64_t tiles = ceil_div(columns, kTile);
  const int64_t r = blockIdx.x / tiles * kTile, c = blockIdx.x % tiles * kTile;
  const int lane = threadIdx.x;
  for (int i = threadIdx.y; i < kTile; i += kRows) {
    if (r + i < rows && c + lane < columns) tile[i][lane] = x[(r + i) * columns + c + lane];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTile; i += kRows) {
    if (c + i < columns && r + lane < rows) {
      y[(c + i) * rows + r + lane] = tile[lane][i];
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
