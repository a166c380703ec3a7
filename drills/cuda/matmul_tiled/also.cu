#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int TILE = 16;

__global__ void __launch_bounds__(TILE * TILE)
    matmul(const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t k) {
  SHARED(float, tiles, [2][2][TILE][TILE]);  // two buffers: one barrier a step
  const int x = threadIdx.x, y = threadIdx.y;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * TILE + y, column = static_cast<int64_t>(blockIdx.x) * TILE + x;
  float sum = 0.0f;
  for (int64_t step = 0; step * TILE < k; ++step) {
    const int64_t left = step * TILE;
    auto& buffer = tiles[step % 2];
    buffer[0][y][x] = row < m && left + x < k ? a[row * k + left + x] : 0.0f;
    buffer[1][y][x] = left + y < k && column < n ? b[(left + y) * n + column] : 0.0f;
    __syncthreads();
    for (int i = 0; i < TILE; ++i) sum += buffer[0][y][i] * buffer[1][i][x];
  }
  if (row < m && column < n) c[row * n + column] = sum;
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t k, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(n, TILE)), static_cast<unsigned>(ceil_div(m, TILE)));
  return static_cast<int>(launch(matmul, grid, dim3(TILE, TILE), 0, stream, a, b, c, m, n, k));
}
