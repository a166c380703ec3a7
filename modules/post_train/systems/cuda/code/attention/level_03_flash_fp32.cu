// FlashAttention in fp32: keys and values pass through shared memory in tiles, and m, l and acc change once a tile.
//
// A block of BLOCK_M queries fetches BLOCK_N keys and values together, neighboring threads neighboring elements. A
// thread owns a query: its scores of the tile are in registers, their maximum gives m', and one factor exp(m − m')
// rescales l and acc for all BLOCK_N keys. k and v come from global memory once for each BLOCK_M queries. The loops
// over a tile read one address for all lanes: a broadcast, one wavefront. (Dao et al. 2022, arXiv:2205.14135.)
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int HEAD_DIM = 64, BLOCK_M = 64, BLOCK_N = 32;

struct Shape {
  int64_t heads, q_len, k_len, dim;
};

// Rows [first, first + BLOCK_N) of a (rows, dim) matrix; what is outside is 0.
__device__ __forceinline__ void fetch(float (&tile)[BLOCK_N][HEAD_DIM], const bf16* x, int64_t first, const Shape& s) {
  for (int i = threadIdx.x; i < BLOCK_N * HEAD_DIM; i += BLOCK_M) {
    const int64_t row = first + i / HEAD_DIM, d = i % HEAD_DIM;
    tile[i / HEAD_DIM][d] = row < s.k_len && d < s.dim ? to_float(x[row * s.dim + d]) : 0.0f;
  }
}

__global__ void __launch_bounds__(BLOCK_M) attention(const bf16* q, const bf16* k, const bf16* v, float* out, Shape s) {
  SHARED(float, ks, [BLOCK_N][HEAD_DIM]);
  SHARED(float, vs, [BLOCK_N][HEAD_DIM]);
  const int64_t blocks = ceil_div(s.q_len, BLOCK_M), head = blockIdx.x / blocks;
  const int64_t query = blockIdx.x % blocks * BLOCK_M + threadIdx.x, at = (head * s.q_len + query) * s.dim;
  const bool mine = query < s.q_len;
  const float scale = rsqrtf(static_cast<float>(s.dim));
  float qs[HEAD_DIM], acc[HEAD_DIM] = {}, m = -INFINITY, l = 0.0f;
#pragma unroll
  for (int d = 0; d < HEAD_DIM; ++d) qs[d] = mine && d < s.dim ? to_float(q[at + d]) * scale : 0.0f;
  for (int64_t first = 0; first < s.k_len; first += BLOCK_N) {
    fetch(ks, k + head * s.k_len * s.dim, first, s);
    fetch(vs, v + head * s.k_len * s.dim, first, s);
    __syncthreads();
    float p[BLOCK_N], m_new = m;  // scores, then exp(scores − m')
#pragma unroll
    for (int j = 0; j < BLOCK_N; ++j) {
      float score = 0.0f;
#pragma unroll
      for (int d = 0; d < HEAD_DIM; ++d) score += qs[d] * ks[j][d];
      p[j] = first + j < s.k_len ? score : -INFINITY;
      m_new = fmaxf(m_new, p[j]);
    }
    const float rescale = __expf(m - m_new);
    l *= rescale;
#pragma unroll
    for (int d = 0; d < HEAD_DIM; ++d) acc[d] *= rescale;
#pragma unroll
    for (int j = 0; j < BLOCK_N; ++j) {
      p[j] = __expf(p[j] - m_new);
      l += p[j];
#pragma unroll
      for (int d = 0; d < HEAD_DIM; ++d) acc[d] += p[j] * vs[j][d];
    }
    m = m_new;
    __syncthreads();  // before the next tile overwrites this one
  }
#pragma unroll
  for (int d = 0; d < HEAD_DIM; ++d) {
    if (mine && d < s.dim) out[at + d] = acc[d] / l;
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
