// C = A B in fp32, A (m, k), B (k, n), any sizes: a block of 16 × 16 threads computes a tile of 16 × 16 of C.
//
// Tiles of A and B go through shared memory, so that each element is read from global memory by one block once: for
// 64 × 64 × 64 at most a tenth of the sectors of the plain kernel. What is outside the matrices counts as 0.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int TILE = 16;

__global__ void __launch_bounds__(TILE * TILE)
    matmul(const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t k) {
  SHARED(float, as, [TILE][TILE]);
  SHARED(float, bs, [TILE][TILE]);
  const int x = threadIdx.x, y = threadIdx.y;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * TILE + y, column = static_cast<int64_t>(blockIdx.x) * TILE + x;
  // write this
  float sum = 0.0f;
  for (int64_t left = 0; left < k; left += TILE) {
    as[y][x] = row < m && left + x < k ? a[row * k + left + x] : 0.0f;
    bs[y][x] = left + y < k && column < n ? b[(left + y) * n + column] : 0.0f;
    __syncthreads();
    for (int i = 0; i < TILE; ++i) sum += as[y][i] * bs[i][x];
    __syncthreads();
  }
  if (row < m && column < n) c[row * n + column] = sum;
  // written
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t k, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(n, TILE)), static_cast<unsigned>(ceil_div(m, TILE)));
  return static_cast<int>(launch(matmul, grid, dim3(TILE, TILE), 0, stream, a, b, c, m, n, k));
}
