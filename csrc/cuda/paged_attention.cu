// Attention of a few queries over a paged cache (Kwon et al. 2023, arXiv:2309.06180) with split keys (Dao et al. 2023,
// Flash-Decoding). With s_j = scale · log2(e) · q·k_j over the tokens of a piece:
//   top = max s_j,   p_j = 2^(s_j − top),   total = Σ p_j,   sum = Σ p_j v_j
// and over the pieces   o = Σ sum · 2^(top − max top) / Σ total · 2^(top − max top).
//
// A block takes a piece of 256 tokens of a sequence and kv head, for up to R rows (the queries of all heads that share
// the kv head), so keys and values come from DRAM once. A lane holds 8 elements of a token, `lanes` of them a token, so
// a warp reads 32 / lanes tokens at a time, 16 bytes a lane where the cache is aligned (8 with 8 bits). Scores lie in
// shared memory between the three steps; each warp sums values of its own tokens, and the four sums are added in order.
//
// Bytes: 2 · tokens · kv_heads · (dim · bytes [+ 4 with 8 bits]) of the cache, and 8 · dim a row and piece of sums.
// 4 · rows FLOPs an element of the cache: with 8 rows 16 FLOPs a byte in bf16, 32 in 8 bits. Below the ridge of every
// GPU's tensor cores and near that of its FMA units; the roof is memory bandwidth.
// Faults: paged_attention.no_barrier_before_softmax paged_attention.no_barrier_before_values
//         paged_attention.no_barrier_before_sum paged_attention.no_tail paged_attention.half_a_dot
//         paged_attention.head_of_another_group paged_attention.window_off_by_one paged_attention.key_scale_for_value
//         paged_attention.no_rescale paged_attention.last_piece_left_out paged_attention.warp_left_out
//         paged_attention.offsets_of_32_bits paged_attention.v_strides_of_k paged_attention.odd_block_stride
#include "finetune/paged_attention.h"
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
                       ((a.k.block % V == 0 && a.v.block % V == 0) || BUG("paged_attention.odd_block_stride"));
  return {lanes, static_cast<int>(threadIdx.x) % lanes, static_cast<int>(a.dim), aligned};
}

template <class C>
__device__ __forceinline__ const C* token_of(const KvPool& pool, int64_t block, int64_t at, int64_t dim) {
  const int64_t offset = block * pool.block + at * dim;
  return static_cast<const C*>(pool.data) +
         (BUG("paged_attention.offsets_of_32_bits") ? static_cast<unsigned>(offset) : offset);
}

// Joins nothing: writes the result of a row whose pieces are all in `sum` (of element d) and {top, total}.
template <class T>
__device__ __forceinline__ void write(const PagedAttention& a, int64_t row, int64_t d, float sum, float2 top) {
  static_cast<T*>(a.out)[row * a.dim + d] = from_float<T>(sum * (top.y == 0 ? 0.0f : 1.0f / top.y));
  if (d == 0) a.lse[row] = (top.x + log2f(top.y)) / kLog2e;
}

template <class T, class C, int R>
__global__ void __launch_bounds__(kThreads, 1) attend(PagedAttention a) {
  SHARED(int2, where, [kPiece]);  // block and offset of each token
  SHARED(float, scores, [R][kPiece]);
  SHARED(int2, bounds, [R]);  // the tokens that a row sees, from the block's first on
  SHARED(float2, tops, [R]);
  DYN_SHARED(float, sums);  // (kWarps, R, dim)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim = static_cast<int>(a.dim);
  const int64_t group = a.heads / a.kv_heads, all_rows = a.queries * group, row_blocks = ceil_div(all_rows, R);
  int64_t index = blockIdx.x;
  const int64_t piece = index % a.pieces, row0 = (index /= a.pieces) % row_blocks * R;
  const int64_t kv_head = (index /= row_blocks) % a.kv_heads, b = index / a.kv_heads;
  const int rows = static_cast<int>(all_rows - row0 < R ? all_rows - row0 : R);

  const int64_t begin = piece * kPiece, first = seen_by(a, b, row0 / group).first, from = max(begin, first);
  int64_t end = min(begin + kPiece, seen_by(a, b, (row0 + rows - 1) / group).last);
  if (from >= end && a.pieces > 1) return;
  if (BUG("paged_attention.no_tail")) end = min(begin + kPiece, ceil_div(end, a.block_size) * a.block_size);
  const int n = from < end ? static_cast<int>(end - from) : 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const unsigned token = static_cast<unsigned>(from) + i, size = static_cast<unsigned>(a.block_size);
    where[i] = make_int2(a.table[b * a.width + token / size], static_cast<int>(token % size));
  }
  if (threadIdx.x < R) {
    const Seen seen = seen_by(a, b, (row0 + threadIdx.x) / group);
    const int64_t low = max(seen.first - from, int64_t{0}) - (BUG("paged_attention.window_off_by_one") ? 1 : 0);
    const int64_t high = BUG("paged_attention.no_tail") ? n : min(seen.last - from, int64_t{kPiece});
    bounds[threadIdx.x] = make_int2(static_cast<int>(min(low, int64_t{kPiece})), static_cast<int>(max(high, low)));
  }
  __syncthreads();

  const Deal<C> deal = deal_of<C>(a);
  const int per_warp = 32 / deal.lanes, own = warp * per_warp + lane / deal.lanes;
  float q[R][kElements];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = row0 + (r < rows ? r : 0), head = row % group;
    const T* x = static_cast<const T*>(a.q) + b * a.q_batch + row / group * a.q_query +
                 (BUG("paged_attention.head_of_another_group") ? head : kv_head * group + head) * a.q_head;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int d = deal.element(j);
      q[r][j] = d < dim ? to_float(x[d]) * (a.scale * kLog2e) : 0.0f;
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
      const int last = BUG("paged_attention.half_a_dot") ? 1 : 0;
      for (int bits = deal.lanes / 2; bits > last; bits /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, bits);
      if (deal.mine == 0 && i < n) scores[r][i] = bounds[r].x <= i && i < bounds[r].y ? dot * scale : -infinity();
    }
  }
  if (!BUG("paged_attention.no_barrier_before_softmax")) __syncthreads();

  for (int r = warp; r < rows; r += kWarps) {
    float top = -infinity(), total = 0;
    for (int i = lane; i < n; i += 32) top = fmaxf(top, scores[r][i]);
    top = warp_max(top);
    const float base = top == -infinity() ? 0.0f : top;  // a row that sees nothing here
    for (int i = lane; i < n; i += 32) {
      const float p = ptx::exp2(scores[r][i] - base);
      scores[r][i] = p;
      total += p;
    }
    total = warp_sum(total);
    if (lane == 0) tops[r] = make_float2(top, total);
  }
  if (!BUG("paged_attention.no_barrier_before_values")) __syncthreads();

  float sum[R][kElements] = {};
#pragma unroll 2
  for (int i = own; i < n; i += kWarps * per_warp) {
    const int64_t block = where[i].x, at = where[i].y * a.kv_heads + kv_head;
    float v[kElements];
    const KvPool pool{a.v.data, a.v.scale,
                      BUG("paged_attention.v_strides_of_k") ? min(a.k.block, a.v.block) : a.v.block, a.v.scale_block};
    deal.load_token(token_of<C>(pool, block, at, a.dim), v);
    const KvPool& scaled = BUG("paged_attention.key_scale_for_value") ? a.k : a.v;
    const float scale = scaled.scale ? scaled.scale[block * scaled.scale_block + at] : 1.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (r >= rows) break;
      const float p = scores[r][i] * scale;
#pragma unroll
      for (int j = 0; j < kElements; ++j) sum[r][j] += p * v[j];
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r >= rows) break;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      for (int bits = deal.lanes; bits < 32; bits *= 2) sum[r][j] += __shfl_xor_sync(0xffffffffu, sum[r][j], bits);
      const int d = deal.element(j);
      if (lane < deal.lanes && d < dim) sums[(warp * R + r) * dim + d] = sum[r][j];
    }
  }
  if (!BUG("paged_attention.no_barrier_before_sum")) __syncthreads();

  for (int i = threadIdx.x; i < rows * dim; i += kThreads) {
    const int r = i / dim, d = i % dim;
    const int64_t row = (b * a.queries + (row0 + r) / group) * a.heads + kv_head * group + (row0 + r) % group;
    float all = 0;
    for (int w = BUG("paged_attention.warp_left_out") ? 1 : 0; w < kWarps; ++w) all += sums[(w * R + r) * dim + d];
    if (a.pieces == 1) {
      write<T>(a, row, d, all, tops[r]);
    } else {
      a.sums[(row * a.pieces + piece) * a.dim + d] = all;
      if (d == 0) reinterpret_cast<float2*>(a.tops)[row * a.pieces + piece] = tops[r];
    }
  }
}

// Joins the pieces of a row, in order. A block takes a row.
template <class T>
__global__ void __launch_bounds__(kThreads) join(PagedAttention a) {
  const int64_t row = blockIdx.x;
  const Seen seen = seen_by(a, row / (a.queries * a.heads), row / a.heads % a.queries);
  const int64_t first = seen.first / kPiece;
  const int64_t last = ceil_div(seen.last, kPiece) - (BUG("paged_attention.last_piece_left_out") ? 1 : 0);
  const float2* tops = reinterpret_cast<const float2*>(a.tops) + row * a.pieces;
  float top = -infinity();
  for (int64_t i = first; i < last; ++i) top = fmaxf(top, tops[i].x);
  for (int64_t d = threadIdx.x; d < a.dim; d += kThreads) {
    float sum = 0, total = 0;
    for (int64_t i = first; i < last; ++i) {
      const float weight = BUG("paged_attention.no_rescale") ? 1.0f : ptx::exp2(tops[i].x - top);
      sum += a.sums[(row * a.pieces + i) * a.dim + d] * weight;
      total += tops[i].y * weight;
    }
    write<T>(a, row, d, sum, make_float2(top, total));
  }
}

template <class T, class C, int R>
Status launch_attend(const PagedAttention& a, void* stream) {
  const int64_t rows = a.queries * (a.heads / a.kv_heads), blocks = a.batch * a.kv_heads * ceil_div(rows, R) * a.pieces;
  return launch(attend<T, C, R>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
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
    return rows == 1 ? launch_attend<T, C, 1>(a, stream) : launch_attend<T, C, 8>(a, stream);
  });
  if (status != Status::ok || a.pieces == 1) return status;
  return for_dtype(a.dtype, [&](auto t) {
    return launch(join<decltype(t)>, dim3(static_cast<unsigned>(a.batch * a.queries * a.heads)), dim3(kThreads), 0,
                  stream, a);
  });
}

}  // namespace finetune
