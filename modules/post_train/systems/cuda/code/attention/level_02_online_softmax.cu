// Online softmax: a query meets its keys one by one, and no score is ever written down.
//
// Of the keys so far a query keeps m = max s_j, l = Σ exp(s_j − m) and acc = Σ exp(s_j − m) · v_j. The next score s
// makes the maximum m' = max(m, s): l and acc are rescaled by exp(m − m') before exp(s − m') and exp(s − m') · v are
// added. At the end out = acc / l. (Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682.)
//
// A thread owns a query: q, acc, m and l are in registers. The lanes of a warp read the same key, one sector a request,
// but every warp reads all of k and v from global memory, element by element.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int HEAD_DIM = 64, BLOCK_M = 64;  // heads of up to HEAD_DIM; queries of a block

struct Shape {
  int64_t heads, q_len, k_len, dim;
};

__global__ void __launch_bounds__(BLOCK_M) attention(const bf16* q, const bf16* k, const bf16* v, float* out, Shape s) {
  const int64_t blocks = ceil_div(s.q_len, BLOCK_M), head = blockIdx.x / blocks;
  const int64_t query = blockIdx.x % blocks * BLOCK_M + threadIdx.x, at = (head * s.q_len + query) * s.dim;
  if (query >= s.q_len) return;
  const float scale = rsqrtf(static_cast<float>(s.dim));
  float qs[HEAD_DIM], acc[HEAD_DIM] = {}, m = -INFINITY, l = 0.0f;
#pragma unroll
  for (int d = 0; d < HEAD_DIM; ++d) qs[d] = d < s.dim ? to_float(q[at + d]) * scale : 0.0f;
  for (int64_t j = 0; j < s.k_len; ++j) {
    const bf16 *key = k + (head * s.k_len + j) * s.dim, *value = v + (head * s.k_len + j) * s.dim;
    float score = 0.0f;
#pragma unroll
    for (int d = 0; d < HEAD_DIM; ++d) {
      if (d < s.dim) score += qs[d] * to_float(key[d]);
    }
    const float m_new = fmaxf(m, score), rescale = __expf(m - m_new), p = __expf(score - m_new);
    l = l * rescale + p;
#pragma unroll
    for (int d = 0; d < HEAD_DIM; ++d) {
      if (d < s.dim) acc[d] = acc[d] * rescale + p * to_float(value[d]);
    }
    m = m_new;
  }
#pragma unroll
  for (int d = 0; d < HEAD_DIM; ++d) {
    if (d < s.dim) out[at + d] = acc[d] / l;
  }
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const void* q, const void* k, const void* v, float* out, float* /*scores*/, int64_t heads,
                            int64_t q_len, int64_t k_len, int64_t dim, void* stream) {
  using namespace finetune;
  if (dim > HEAD_DIM) return static_cast<int>(Status::unsupported);
  const dim3 grid(static_cast<unsigned>(heads * ceil_div(q_len, BLOCK_M)));
  return static_cast<int>(launch(attention, grid, dim3(BLOCK_M), 0, stream, static_cast<const bf16*>(q),
                                 static_cast<const bf16*>(k), static_cast<const bf16*>(v), out,
                                 Shape{heads, q_len, k_len, dim}));
}
