#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int D = 32, WARPS = 4, TILE = 32;

__global__ void __launch_bounds__(32 * WARPS)
    attention(const float* q, const float* k, const float* v, float* o, int64_t tq, int64_t tk) {
  SHARED(float, tile, [2][TILE][D + 1]);
  SHARED(float, weights, [WARPS][TILE]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + warp;
  float own[D];  // the query, in every lane
  for (int c = 0; c < D; ++c) own[c] = row < tq ? q[row * D + c] * 0.17677669529663687f : 0.0f;
  float m = -INFINITY, l = 0.0f, acc = 0.0f;
  for (int64_t top = 0; top < tk; top += TILE) {
    for (int i = threadIdx.x; i < TILE * D; i += 32 * WARPS) {
      const bool inside = top + i / D < tk;
      tile[0][i / D][i % D] = inside ? k[top * D + i] : 0.0f;
      tile[1][i / D][i % D] = inside ? v[top * D + i] : 0.0f;
    }
    __syncthreads();
    float s = top + lane < tk ? 0.0f : -INFINITY;
    for (int c = 0; c < D; ++c) s += own[c] * tile[0][lane][c];
    float larger = fmaxf(m, warp_max(s));
    weights[warp][lane] = expf(s - larger);
    __syncwarp();
    l *= expf(m - larger);
    acc *= expf(m - larger);
    for (int j = 0; j < TILE; ++j) {
      l += weights[warp][j];
      acc += weights[warp][j] * tile[1][j][lane];
    }
    m = larger;
    __syncthreads();
  }
  if (row < tq) o[row * D + lane] = acc / l;
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* q, const float* k, const float* v, float* o, int64_t tq, int64_t tk, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(tq, WARPS)));
  return static_cast<int>(launch(attention, grid, dim3(32 * WARPS), 0, stream, q, k, v, o, tq, tk));
}
