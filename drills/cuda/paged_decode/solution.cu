// One query a sequence over a cache in blocks of 16 tokens, one head of 32 numbers, fp32.
//
// q (sequences, 32); keys and values (blocks, 16, 32); table (sequences, most) int32: the blocks of a sequence in order;
// lengths (sequences) int32: how many tokens it has, 0 too → o (sequences, 32). Token t of sequence s lies in block
// table[s, t / 16] at place t % 16. Entries of the table behind the length may be anything. A sequence without tokens gives
// zeros. A warp a sequence: lane c keeps element c of the result; scores by a reduction over the warp.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int D = 32, PAGE = 16;

__global__ void __launch_bounds__(32) decode(const float* q, const float* keys, const float* values, const int* table,
                                             const int* lengths, float* o, int64_t most) {
  const int64_t s = blockIdx.x;
  const int lane = threadIdx.x;
  // write this
  const float own = q[s * D + lane] / sqrtf(static_cast<float>(D));
  float largest = -INFINITY, sum = 0.0f, out = 0.0f;
  for (int t = 0; t < lengths[s]; ++t) {
    const int64_t at = (static_cast<int64_t>(table[s * most + t / PAGE]) * PAGE + t % PAGE) * D + lane;
    float score = own * keys[at];
    for (int step = 16; step > 0; step /= 2) score += __shfl_xor_sync(0xffffffffu, score, step);
    const float larger = fmaxf(largest, score), shrink = expf(largest - larger), p = expf(score - larger);
    sum = sum * shrink + p;
    out = out * shrink + p * values[at];
    largest = larger;
  }
  o[s * D + lane] = lengths[s] > 0 ? out / sum : 0.0f;
  // written
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* q, const float* keys, const float* values, const int* table, const int* lengths,
                      float* o, int64_t sequences, int64_t most, void* stream) {
  using namespace finetune;
  return static_cast<int>(launch(decode, dim3(static_cast<unsigned>(sequences)), dim3(32), 0, stream, q, keys, values,
                                 table, lengths, o, most));
}
