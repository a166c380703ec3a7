#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int D = 32, PAGE = 16;

__global__ void __launch_bounds__(32) decode(const float* q, const float* keys, const float* values, const int* table,
                                             const int* lengths, float* o, int64_t most) {
  SHARED(float, query, [D]);
  const int64_t s = blockIdx.x;
  const int lane = threadIdx.x, length = lengths[s];
  query[lane] = q[s * D + lane];
  __syncwarp();
  float m = -INFINITY, l = 0.0f, acc = 0.0f;
  for (int top = 0; top < length; top += 32) {  // a lane scores a token of its own
    const int t = top + lane;
    float score = -INFINITY;
    int64_t at = 0;
    if (t < length) {
      at = (static_cast<int64_t>(table[s * most + t / PAGE]) * PAGE + t % PAGE) * D;
      score = 0.0f;
      for (int c = 0; c < D; ++c) score += query[c] * keys[at + c];
      score *= 0.17677669529663687f;
    }
    const float larger = fmaxf(m, warp_max(score)), p = expf(score - larger), shrink = expf(m - larger);
    l = l * shrink + warp_sum(p);
    acc *= shrink;
    for (int j = 0; j < 32 && top + j < length; ++j) {
      acc += __shfl_sync(0xffffffffu, p, j) * values[__shfl_sync(0xffffffffu, at, j) + lane];
    }
    m = larger;
  }
  o[s * D + lane] = length > 0 ? acc / l : 0.0f;
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* q, const float* keys, const float* values, const int* table, const int* lengths,
                      float* o, int64_t sequences, int64_t most, void* stream) {
  using namespace finetune;
  return static_cast<int>(launch(decode, dim3(static_cast<unsigned>(sequences)), dim3(32), 0, stream, q, keys, values,
                                 table, lengths, o, most));
}
