// Attention of a few queries over a paged cache (Kwon et al. 2023, arXiv:2309.06180) with split keys (Dao et al. 2023,
// Flash-Decoding). With s_j = scale · log2(e) · q·k_j, or with a softcap c log2(e) tanh(scale / c · q·k_j), over the
// tokens of a piece:
//   m = max s_j,   p_j = 2^(s_j − m),   l = Σ p_j,   acc = Σ p_j v_j
// and over the pieces   o = Σ acc · 2^(m − max m) / Σ l · 2^(m − max m).
//
// A block takes a piece of 256 tokens of a sequence and kv head, for up to R rows (the queries of all heads that share
// the kv head), so keys and values come from DRAM once. A lane holds 8 elements of a token, `lanes` of them a token, so
// a warp reads 32 / lanes tokens at a time, 16 bytes a lane where the cache is aligned (8 with 8 bits). Scores lie in
// shared memory between the three steps; each warp sums values of its own tokens, and the four sums are added in order.
//
// Bytes: 2 · tokens · kv_heads · (dim · bytes [+ 4 with 8 bits]) of the cache, and 8 · dim a row and piece of sums.
// 4 · rows FLOPs an element of the cache: with 8 rows 16 FLOPs a byte in bf16, 32 in 8 bits. Below the ridge of every
// GPU's tensor cores and near that of its FMA units; the roof is memory bandwidth.
#include "finetune/paged_attention.h"

#include "attention_common.cuh"
#include "device/kv_types.cuh"
#include "device/ptx.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int kPiece = PagedAttention::piece, kWarps = 4, kThreads = 32 * kWarps, kElements = 8, kMostDim = 256;
constexpr float kLog2e = 1.44269504088896f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// How a token's elements are dealt out to the lanes: in vectors of V, lane after lane.
template <class C>
struct Deal {
  static constexpr int V = sizeof(C) == 4 ? 4 : 8;
  int lanes, mine;  // lanes of a token, and which of them this one is
  int dim;
  bool aligned;  // every token begins at a multiple of V elements

  __device__ int element(int j) const { return (j / V * lanes + mine) * V + j % V; }

  __device__ __forceinline__ void load_token(const C* token, float (&x)[kElements]) const {
#pragma unroll
    for (int n = 0; n < kElements; n += V) {
      const int first = element(n);
      if (aligned && first < dim) {
        const auto v = load<C, V>(token + first);
#pragma unroll
        for (int j = 0; j < V; ++j) x[n + j] = to_float(v.at[j]);
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) x[n + j] = first + j < dim ? to_float(token[first + j]) : 0.0f;
      }
    }
  }
};

template <class C>
__device__ __forceinline__ Deal<C> deal_of(const PagedAttention& a) {
  constexpr int V = Deal<C>::V;
  int lanes = 1;
  while (lanes * kElements < a.dim) lanes *= 2;
  const bool aligned = is_aligned(a.k.data, V * sizeof(C)) && is_aligned(a.v.data, V * sizeof(C)) && a.dim % V == 0 &&
                       a.k.block % V == 0 && a.v.block % V == 0;
  return {lanes, static_cast<int>(threadIdx.x) % lanes, static_cast<int>(a.dim), aligned};
}

template <class C>
__device__ __forceinline__ const C* token_of(const KvPool& pool, int64_t block, int64_t at, int64_t dim) {
  const int64_t offset = block * pool.block + at * dim;
  return static_cast<const C*>(pool.data) + offset;
}

// Writes element d of a row's result, and with the first one its log-sum-exp. ml: {m, l} of all its pieces.
template <class T>
__device__ __forceinline__ void write(const PagedAttention& a, int64_t row, int64_t d, float acc, float2 ml) {
  static_cast<T*>(a.out)[row * a.dim + d] = from_float<T>(acc * (ml.y == 0 ? 0.0f : 1.0f / ml.y));
  if (d == 0) a.lse[row] = (ml.x + log2f(ml.y)) / kLog2e;
}

template <class T, class C, int R, bool kCapped>
__global__ void __launch_bounds__(kThreads, 1) attend(PagedAttention a) {
  SHARED(int2, where, [kPiece]);  // block and offset of each token
  SHARED(float, scores, [R][kPiece]);
  SHARED(int2, bounds, [R]);  // the tokens that a row sees, from the block's first on
  SHARED(float2, ml, [R]);    // {m, l} of each row
  DYN_SHARED(float, sums);    // (kWarps, R, dim)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim = static_cast<int>(a.dim);
  const int64_t group = a.heads / a.kv_heads, all_rows = a.queries * group, row_blocks = ceil_div(all_rows, R);
  int64_t index = blockIdx.x;
  const int64_t piece = index % a.pieces, row0 = (index /= a.pieces) % row_blocks * R;
  const int64_t kv_head = (index /= row_blocks) % a.kv_heads, b = index / a.kv_heads;
  const int rows = static_cast<int>(all_rows - row0 < R ? all_rows - row0 : R);

  const int64_t begin = piece * kPiece, first = seen_by(a, b, row0 / group).first, from = max(begin, first);
  const int64_t end = min(begin + kPiece, seen_by(a, b, (row0 + rows - 1) / group).last);
  if (from >= end && a.pieces > 1) return;
  const int n = from < end ? static_cast<int>(end - from) : 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const unsigned token = static_cast<unsigned>(from) + i, size = static_cast<unsigned>(a.block_size);
    where[i] = make_int2(a.table[b * a.width + token / size], static_cast<int>(token % size));
  }
  if (threadIdx.x < R) {
    const Seen seen = seen_by(a, b, (row0 + threadIdx.x) / group);
    const int64_t low = max(seen.first - from, int64_t{0});
    const int64_t high = min(seen.last - from, int64_t{kPiece});
    bounds[threadIdx.x] = make_int2(static_cast<int>(min(low, int64_t{kPiece})), static_cast<int>(max(high, low)));
  }
  __syncthreads();

  const Deal<C> deal = deal_of<C>(a);
  const int per_warp = 32 / deal.lanes, own = warp * per_warp + lane / deal.lanes;
  const float factor = kCapped ? a.scale / a.softcap : a.scale * kLog2e;
  float q[R][kElements];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = row0 + (r < rows ? r : 0), head = row % group;
    const T* x =
        static_cast<const T*>(a.q) + b * a.q_batch + row / group * a.q_query + (kv_head * group + head) * a.q_head;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int d = deal.element(j);
      q[r][j] = d < dim ? to_float(x[d]) * factor : 0.0f;
    }
  }
#pragma unroll 2
  for (int i0 = warp * per_warp; i0 < n; i0 += kWarps * per_warp) {
    const int i = i0 + lane / deal.lanes, token = i < n ? i : n - 1;  // lanes of no token repeat the last one's
    const int64_t block = where[token].x, at = where[token].y * a.kv_heads + kv_head;
    float k[kElements];
    deal.load_token(token_of<C>(a.k, block, at, a.dim), k);
    const float scale = a.k.scale ? a.k.scale[block * a.k.scale_block + at] : 1.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (r >= rows) break;
      float dot = 0;
#pragma unroll
      for (int j = 0; j < kElements; ++j) dot += q[r][j] * k[j];
      for (int bits = deal.lanes / 2; bits > 0; bits /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, bits);
      float score = dot * scale;
      if constexpr (kCapped) score = a.softcap * kLog2e * attention::hyperbolic_tangent(score);
      if (deal.mine == 0 && i < n) scores[r][i] = bounds[r].x <= i && i < bounds[r].y ? score : -infinity();
    }
  }
  __syncthreads();

  for (int r = warp; r < rows; r += kWarps) {
    float m = -infinity(), l = 0;
    for (int i = lane; i < n; i += 32) m = fmaxf(m, scores[r][i]);
    m = warp_max(m);
    const float base = m == -infinity() ? 0.0f : m;  // a row that sees nothing here
    for (int i = lane; i < n; i += 32) {
      const float p = ptx::exp2(scores[r][i] - base);
      scores[r][i] = p;
      l += p;
    }
    l = warp_sum(l);
    if (lane == 0) ml[r] = make_float2(m, l);
  }
  __syncthreads();

  float acc[R][kElements] = {};
#pragma unroll 2
  for (int i = own; i < n; i += kWarps * per_warp) {
    const int64_t block = where[i].x, at = where[i].y * a.kv_heads + kv_head;
    float v[kElements];
    deal.load_token(token_of<C>(a.v, block, at, a.dim), v);
    const float scale = a.v.scale ? a.v.scale[block * a.v.scale_block + at] : 1.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (r >= rows) break;
      const float p = scores[r][i] * scale;
#pragma unroll
      for (int j = 0; j < kElements; ++j) acc[r][j] += p * v[j];
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r >= rows) break;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      for (int bits = deal.lanes; bits < 32; bits *= 2) acc[r][j] += __shfl_xor_sync(0xffffffffu, acc[r][j], bits);
      const int d = deal.element(j);
      if (lane < deal.lanes && d < dim) sums[(warp * R + r) * dim + d] = acc[r][j];
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < rows * dim; i += kThreads) {
    const int r = i / dim, d = i % dim;
    const int64_t row = (b * a.queries + (row0 + r) / group) * a.heads + kv_head * group + (row0 + r) % group;
    float all = 0;
    for (int w = 0; w < kWarps; ++w) all += sums[(w * R + r) * dim + d];
    if (a.pieces == 1) {
      write<T>(a, row, d, all, ml[r]);
    } else {
      a.sums[(row * a.pieces + piece) * a.dim + d] = all;
      if (d == 0) reinterpret_cast<float2*>(a.tops)[row * a.pieces + piece] = ml[r];
    }
  }
}

// Joins the pieces of a row, in order. A block takes a row.
template <class T>
__global__ void __launch_bounds__(kThreads) join(PagedAttention a) {
  const int64_t row = blockIdx.x;
  const Seen seen = seen_by(a, row / (a.queries * a.heads), row / a.heads % a.queries);
  const int64_t first = seen.first / kPiece;
  const int64_t last = ceil_div(seen.last, kPiece);
  const float2* ml = reinterpret_cast<const float2*>(a.tops) + row * a.pieces;
  float m = -infinity();
  for (int64_t i = first; i < last; ++i) m = fmaxf(m, ml[i].x);
  for (int64_t d = threadIdx.x; d < a.dim; d += kThreads) {
    float acc = 0, l = 0;
    for (int64_t i = first; i < last; ++i) {
      const float weight = ptx::exp2(ml[i].x - m);
      acc += a.sums[(row * a.pieces + i) * a.dim + d] * weight;
      l += ml[i].y * weight;
    }
    write<T>(a, row, d, acc, make_float2(m, l));
  }
}

template <class T, class C, int R, bool kCapped>
Status launch_attend(const PagedAttention& a, void* stream) {
  const int64_t rows = a.queries * (a.heads / a.kv_heads), blocks = a.batch * a.kv_heads * ceil_div(rows, R) * a.pieces;
  return launch(attend<T, C, R, kCapped>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                kWarps * R * a.dim * sizeof(float), stream, a);
}

}  // namespace

template <>
Status launch_cuda(const PagedAttention& a, void* stream) {
  if (a.dim > kMostDim) return Status::unsupported;
  const int64_t rows = a.queries * (a.heads / a.kv_heads);
  const Status status = for_types(a.dtype, a.stored, [&](auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    if (a.softcap > 0)
      return rows == 1 ? launch_attend<T, C, 1, true>(a, stream) : launch_attend<T, C, 8, true>(a, stream);
    return rows == 1 ? launch_attend<T, C, 1, false>(a, stream) : launch_attend<T, C, 8, false>(a, stream);
  });
  if (status != Status::ok || a.pieces == 1) return status;
  return for_dtype(a.dtype, [&](auto t) {
    return launch(join<decltype(t)>, dim3(static_cast<unsigned>(a.batch * a.queries * a.heads)), dim3(kThreads), 0,
                  stream, a);
  });
}

}  // namespace finetune
