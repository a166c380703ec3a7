// o = softmax(q kᵀ / √d) v for one head in fp32: q (tq, 32), k and v (tk, 32), tk ≥ 1 → (tq, 32). No mask.
//
// A warp a query, four warps a block. Keys come in tiles of 32 through shared memory, shared by the four queries. Lane j
// scores key j of the tile; the maximum and the sum are carried from tile to tile (online softmax), so that the scores
// never leave the registers. Lane c keeps element c of the result.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int D = 32, WARPS = 4, TILE = 32;

__global__ void __launch_bounds__(32 * WARPS)
    attention(const float* q, const float* k, const float* v, float* o, int64_t tq, int64_t tk) {
  SHARED(float, ks, [TILE][D + 1]);
  SHARED(float, vs, [TILE][D]);
  SHARED(float, qs, [WARPS][D]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + warp;
  qs[warp][lane] = row < tq ? q[row * D + lane] : 0.0f;
  // write this
  float largest = -INFINITY, sum = 0.0f, out = 0.0f;
  for (int64_t top = 0; top < tk; top += TILE) {
    __syncthreads();  // the tile before has been read
    for (int i = warp; i < TILE; i += WARPS) {
      const bool inside = top + i < tk;
      ks[i][lane] = inside ? k[(top + i) * D + lane] : 0.0f;
      vs[i][lane] = inside ? v[(top + i) * D + lane] : 0.0f;
    }
    __syncthreads();
    float score = 0.0f;
    for (int c = 0; c < D; ++c) score += qs[warp][c] * ks[lane][c];
    score = top + lane < tk ? score / sqrtf(static_cast<float>(D)) : -INFINITY;
    float most = score;
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    most = fmaxf(most, largest);
    const float p = expf(score - most), shrink = expf(largest - most);
    float total = p;
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    sum = sum * shrink + total;
    out *= shrink;
    for (int j = 0; j < TILE; ++j) out += __shfl_sync(0xffffffffu, p, j) * vs[j][lane];
    largest = most;
  }
  if (row < tq) o[row * D + lane] = out / sum;
  // written
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* q, const float* k, const float* v, float* o, int64_t tq, int64_t tk, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(tq, WARPS)));
  return static_cast<int>(launch(attention, grid, dim3(32 * WARPS), 0, stream, q, k, v, o, tq, tk));
}
