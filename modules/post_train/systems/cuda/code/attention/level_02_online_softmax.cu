// No matrix of scores: keys and values pass through shared memory in tiles, and the softmax is computed online.
//
// A thread owns a query: q and the output in registers, with the maximum m and the sum l of its row so far. A tile that
// brings a larger maximum rescales l and the output by exp(m − m'). Global memory sees q, k, v and the output only; k
// and v once for each 64 queries. The loop over a tile reads one address for all lanes: a broadcast, one wavefront.
// (Rabe & Staats 2021, arXiv:2112.05682; Dao et al. 2022, arXiv:2205.14135, algorithm 1.)
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int kDim = 64, kQueries = 64, kKeys = 32;  // heads of up to kDim; queries of a block; keys of a tile

struct Shape {
  int64_t heads, q_len, k_len, dim;
};

// Rows [first, first + kKeys) of a (rows, dim) matrix; what is outside is 0.
__device__ __forceinline__ void fetch(float (&tile)[kKeys][kDim], const bf16* x, int64_t first, const Shape& s) {
  for (int i = threadIdx.x; i < kKeys * kDim; i += kQueries) {
    const int64_t row = first + i / kDim, d = i % kDim;
    tile[i / kDim][d] = row < s.k_len && d < s.dim ? to_float(x[row * s.dim + d]) : 0.0f;
  }
}

__global__ void __launch_bounds__(kQueries)
    attention(const bf16* q, const bf16* k, const bf16* v, float* out, Shape s) {
  SHARED(float, ks, [kKeys][kDim]);
  SHARED(float, vs, [kKeys][kDim]);
  const int64_t parts = ceil_div(s.q_len, kQueries), head = blockIdx.x / parts;
  const int64_t query = blockIdx.x % parts * kQueries + threadIdx.x, at = (head * s.q_len + query) * s.dim;
  const bool mine = query < s.q_len;
  const float scale = rsqrtf(static_cast<float>(s.dim));
  float qs[kDim], sum[kDim] = {}, most = -INFINITY, total = 0.0f;
#pragma unroll
  for (int d = 0; d < kDim; ++d) qs[d] = mine && d < s.dim ? to_float(q[at + d]) * scale : 0.0f;
  for (int64_t first = 0; first < s.k_len; first += kKeys) {
    fetch(ks, k + head * s.k_len * s.dim, first, s);
    fetch(vs, v + head * s.k_len * s.dim, first, s);
    __syncthreads();
    const int64_t left = s.k_len - first, keys = left < kKeys ? left : kKeys;
    for (int j = 0; j < keys; ++j) {
      float score = 0.0f;
#pragma unroll
      for (int d = 0; d < kDim; ++d) score += qs[d] * ks[j][d];
      const float larger = fmaxf(most, score), p = __expf(score - larger);
      const float rescale = __expf(most - larger);
      total = total * rescale + p;
#pragma unroll
      for (int d = 0; d < kDim; ++d) sum[d] = sum[d] * rescale + p * vs[j][d];
      most = larger;
    }
    __syncthreads();
  }
#pragma unroll
  for (int d = 0; d < kDim; ++d) {
    if (mine && d < s.dim) out[at + d] = sum[d] / total;
  }
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const void* q, const void* k, const void* v, float* out, float* /*scores*/, int64_t heads,
                            int64_t q_len, int64_t k_len, int64_t dim, void* stream) {
  using namespace finetune;
  if (dim > kDim) return static_cast<int>(Status::unsupported);
  const dim3 grid(static_cast<unsigned>(heads * ceil_div(q_len, kQueries)));
  return static_cast<int>(launch(attention, grid, dim3(kQueries), 0, stream, static_cast<const bf16*>(q),
                                 static_cast<const bf16*>(k), static_cast<const bf16*>(v), out,
                                 Shape{heads, q_len, k_len, dim}));
}
