// Instead of padding the columns are swizzled: row i keeps its element j at j XOR i.
//
// Column j of row i is in bank j ^ i, and for a fixed j that takes every value once: again one wavefront, and no
// padding, so that every row still begins on 128 bytes. Padding would break the alignment that 16-byte accesses,
// ldmatrix and TMA need, which is why the tensor-core levels swizzle.
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
    if (r + i < rows && c + lane < columns) tile[i][lane ^ i] = x[(r + i) * columns + c + lane];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTile; i += kRows) {
    if (c + i < columns && r + lane < rows) {
      y[(c + i) * rows + r + lane] = tile[lane][i ^ lane];
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
