// A block keeps a 32 × 32 tile of A and of B in shared memory, and each of its elements is used 32 times.
//
// Global traffic falls by the width of the tile: an element of A is read N / 32 times instead of N / 16 (the lanes of a
// request shared it) and from one request in a row. What takes over is shared memory: two reads for one multiply-add.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int kTile = 32;

__global__ void __launch_bounds__(kTile* kTile)
    matmul(const bf16* a, const bf16* b, float* c, int64_t m, int64_t n, int64_t k) {
  SHARED(bf16, as, [kTile][kTile]);
  SHARED(bf16, bs, [kTile][kTile]);
  const int64_t tiles = ceil_div(n, kTile);
  const int x = threadIdx.x, y = threadIdx.y;
  const int64_t row = blockIdx.x / tiles * kTile + y, column = blockIdx.x % tiles * kTile + x;
  float sum = 0.0f;
  for (int64_t first = 0; first < k; first += kTile) {
    as[y][x] = row < m && first + x < k ? a[row * k + first + x] : from_float<bf16>(0.0f);
    bs[y][x] = first + y < k && column < n ? b[(first + y) * n + column] : from_float<bf16>(0.0f);
    __syncthreads();  // the tile is there
    for (int i = 0; i < kTile; ++i) sum += to_float(as[y][i]) * to_float(bs[i][x]);
    __syncthreads();  // all have read it: the next one may come
  }
  if (row < m && column < n) c[row * n + column] = sum;
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(m, kTile) * ceil_div(n, kTile)));
  return static_cast<int>(launch(matmul, grid, dim3(kTile, kTile), 0, stream, static_cast<const bf16*>(a),
                                 static_cast<const bf16*>(b), c, m, n, k));
}
