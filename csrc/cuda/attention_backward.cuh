// Attention's backward pass; the maths is in attention.cu. P and dS are made twice, once per key tile for dK and dV and
// once per query tile for dQ: no atomics, so the same bits at every run.
//
// One kernel that makes them once would save 4 D of 14 D FLOPs for each (query, key) pair, but blocks of 64 keys would
// each have to add 64 × D fp32 to dQ, in a fixed order: 8 bytes there and back for 64 pairs and column, D / 8 bytes a
// pair. 32 FLOPs saved for a byte moved is too few: an A100 makes 153 in the time of a byte of DRAM, and about 60 in
// that of a byte of L2. Blocks of 128 keys would come out even, with dK and dV in half of the register file.
#pragma once

#include "attention_warp.cuh"

namespace finetune::attention {

// Shared memory of both kernels: the block's own two tiles, two streamed tiles and their rows' statistics for each
// stage, the warps' scratch.
template <class T, int D>
struct BackwardMemory {
  using W = Warp<T, D>;
  static constexpr int N = W::kBackwardStream;
  static constexpr int kRowsOfO = W::kOwn > W::kDiagonal ? W::kOwn : W::kDiagonal;  // where the streamed tiles will be
  static_assert(2 * W::kStages * N >= kRowsOfO);
  static constexpr size_t kOwnBytes = W::kOwn * D * sizeof(T), kStreamBytes = N * D * sizeof(T),
                          kStatistics = 2 * kOwnBytes + 2 * W::kStages * kStreamBytes,
                          kScratch = kStatistics + W::kStages * N * sizeof(AttentionRow),
                          kBytes = kScratch + W::kScratch;
  unsigned char* memory;

  __device__ Tile<T, D> own(int which) const { return {reinterpret_cast<T*>(memory + which * kOwnBytes)}; }
  __device__ Tile<T, D> streamed(int which, int stage) const {
    return {reinterpret_cast<T*>(memory + 2 * kOwnBytes + (2 * stage + which) * kStreamBytes)};
  }
  __device__ AttentionRow* rows(int stage) const {
    return reinterpret_cast<AttentionRow*>(memory + kStatistics) + stage * N;
  }
  __device__ unsigned char* scratch() const { return memory + kScratch; }
};

// Of a query tile; the keys stream past.  S = Q Kᵀ,   dP = dO Vᵀ,   dS = P ∘ (dP − delta),   dQ += dS K.
// delta = dO · O comes from the products that make dP, and so in their order: where a row's P is 1 at one key and 0
// elsewhere, they cancel to the bit, as they should. It is left in a.rows for backward_keys.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) backward_queries(AttentionBackwardCuda a) {
  using W = Warp<T, D>;
  constexpr int N = W::kBackwardStream, kRows = W::kRows;
  DYN_SHARED(unsigned char, memory);
  const BackwardMemory<T, D> m{memory};
  const Place p = place(a, gridDim.x - 1 - blockIdx.x, false, W::kOwn, 1);
  if (!p.rows) return;
  const W w(m.scratch());

  const int kv_head = p.head / static_cast<int>(a.heads / a.kv_heads);
  const int least = p.s.limit(p.first), most = p.s.limit(p.first + p.rows - 1);
  const bool chunks_k = in_chunks<T>(a.k, a.dim), chunks_v = in_chunks<T>(a.v, a.dim);
  const auto load = [&](int n, int stage) {
    const int key = n * N;
    load_tile<N>(m.streamed(0, stage), at<const T>(a.k, p.s, key, kv_head), a.k.token, most - key, a.dim, chunks_k);
    load_tile<N>(m.streamed(1, stage), at<const T>(a.v, p.s, key, kv_head), a.v.token, most - key, a.dim, chunks_v);
  };

  const Tile<T, D> o = m.streamed(0, 0);  // until the first keys come
  load_tile<W::kOwn>(m.own(0), at<const T>(a.q, p.s, p.first, p.head), a.q.token, p.rows, a.dim,
                     in_chunks<T>(a.q, a.dim));
  load_tile<W::kOwn>(m.own(1), at<const T>(a.grad_o, p.s, p.first, p.head), a.grad_o.token, p.rows, a.dim,
                     in_chunks<T>(a.grad_o, a.dim));
  load_tile<BackwardMemory<T, D>::kRowsOfO>(o, at<const T>(a.o, p.s, p.first, p.head), a.o.token, p.rows, a.dim,
                                            in_chunks<T>(a.o, a.dim));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  typename W::template Matrix<W::kDiagonal> dots;  // of the warp's rows of dO with rows of O, among them the same ones
  const int other = w.diagonal();
  w.multiply(m.own(1), Tile<T, D>{o.data + other * D}, dots);

  int limit[kRows];
  AttentionRow rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = w.row(r);
    limit[r] = p.s.limit(min(p.first + row, p.s.queries - 1));
    float delta = 0;
#pragma unroll
    for (int c = 0; c < dots.kColumns; ++c) delta = other + w.column(c) == row ? dots.at(r, c) : delta;
    delta = w.over_row(delta, [](float x, float y) { return x + y; });
    rows[r] = {0, 0, BUG("attention.no_delta") ? 0.0f : delta, 0};
    if (row >= p.rows) continue;
    const int64_t i = row_index(a, p.s, p.head, p.first + row);
    if (a.total[i] != 0) rows[r].top = a.top[i], rows[r].share = 1 / a.total[i];
    if (w.column(0) == 0) a.rows[i] = rows[r];
  }
  if (!BUG("attention.no_barrier_after_delta")) __syncthreads();

  typename W::template Matrix<D> dq;
  pipeline<W::kStages>(static_cast<int>(ceil_div(most, N)), load, [&](int n, int stage) {
    const Tile<T, D> k = m.streamed(0, stage), v = m.streamed(1, stage);
    const int key = n * N;
    const bool whole = key + N <= least;
    typename W::template Matrix<N> x, slope;  // S; dP, then dS
    w.multiply(m.own(0), k, x);
    w.multiply(m.own(1), v, slope);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < x.kColumns; ++c) {
        const float y = ptx::exp2(__fmul_rn(x.at(r, c), a.scale * kLog2e) - rows[r].top) * rows[r].share;
        slope.at(r, c) = y * (slope.at(r, c) - rows[r].delta);
      }
    }
    if (!whole && !BUG("attention.no_mask_for_dq")) {  // the last tiles
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < x.kColumns; ++c) {
          if (key + w.column(c) >= limit[r]) slope.at(r, c) = 0;
        }
      }
    }
    w.accumulate(slope, k, 0, dq);
  });

  float scale[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) scale[r] = a.scale;
  w.put(dq, scale, m.own(0), 0);
  store_rows(m.own(0), w.first, min(max(p.rows - w.first, 0), W::kWarpRows),
             at<T>(a.dq, p.s, p.first + w.first, p.head), a.dq.token, 0, a.dim, in_chunks<T>(a.dq, a.dim));
}

// Of a key tile and one key/value head; where a block's registers do not hold all columns (D = 256), for a part of
// them. The queries of all the heads that share it stream past.
// Sᵀ = K Qᵀ,   dPᵀ = V dOᵀ,   dV += Pᵀ dO,   dK += dSᵀ Q.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) backward_keys(AttentionBackwardCuda a) {
  using W = Warp<T, D>;
  constexpr int N = W::kBackwardStream, kRows = W::kRows, kColumns = W::kKeyColumns;
  DYN_SHARED(unsigned char, memory);
  const BackwardMemory<T, D> m{memory};
  const Place p = place(a, blockIdx.x, true, W::kOwn, D / kColumns);
  if (!p.rows) return;
  const W w(m.scratch());

  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int real = min(max(p.s.keys - p.first, 0), p.rows);  // keys past the length get the gradient 0
  const int from = real ? min(p.s.since(p.first), p.s.queries) : p.s.queries;
  const int steps = static_cast<int>(ceil_div(p.s.queries - from, N));  // for each head
  const bool chunks_q = in_chunks<T>(a.q, a.dim), chunks_g = in_chunks<T>(a.grad_o, a.dim);
  const auto load = [&](int n, int stage) {
    if (n == 0) {
      load_tile<W::kOwn>(m.own(0), at<const T>(a.k, p.s, p.first, p.head), a.k.token, real, a.dim,
                         in_chunks<T>(a.k, a.dim));
      load_tile<W::kOwn>(m.own(1), at<const T>(a.v, p.s, p.first, p.head), a.v.token, real, a.dim,
                         in_chunks<T>(a.v, a.dim));
    }
    const int head = p.head * group + (BUG("attention.first_head_of_the_group") ? 0 : n / steps);
    const int query = from + n % steps * N, left = p.s.queries - query;
    load_tile<N>(m.streamed(0, stage), at<const T>(a.q, p.s, query, head), a.q.token, left, a.dim, chunks_q);
    load_tile<N>(m.streamed(1, stage), at<const T>(a.grad_o, p.s, query, head), a.grad_o.token, left, a.dim, chunks_g);
    const AttentionRow* const rows = a.rows + row_index(a, p.s, head, query);
    for (int i = threadIdx.x; i < N; i += kThreads) {
      ptx::cp_async16(m.rows(stage) + i, i < left ? rows + i : a.rows, i < left);
    }
  };

  int since[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) since[r] = w.row(r) < real ? p.s.since(p.first + w.row(r)) : 0x7fffffff;
  typename W::template Matrix<kColumns> dk, dv;
  pipeline<W::kStages>(group * steps, load, [&](int n, int stage) {
    const Tile<T, D> q = m.streamed(0, stage), grad = m.streamed(1, stage);
    const int query = from + n % steps * N;
    const bool whole =
        real == W::kOwn && (query >= p.s.since(p.first + real - 1) || BUG("attention.no_causal_mask_for_dk"));
    typename W::template Matrix<N> x, slope;  // Sᵀ, then Pᵀ; dPᵀ, then dSᵀ
    w.multiply(m.own(0), q, x);
    w.multiply(m.own(1), grad, slope);
#pragma unroll
    for (int c = 0; c < x.kColumns; ++c) {
      const AttentionRow row = m.rows(stage)[w.column(c)];  // past the last query the share is 0
      const float share = BUG("attention.no_share") ? 1.0f : row.share;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        x.at(r, c) = ptx::exp2(__fmul_rn(x.at(r, c), a.scale * kLog2e) - row.top) * share;
        slope.at(r, c) = x.at(r, c) * (slope.at(r, c) - row.delta);
      }
    }
    if (!whole) {  // the first tiles, and the last keys
#pragma unroll
      for (int c = 0; c < x.kColumns; ++c) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (query + w.column(c) < since[r]) x.at(r, c) = slope.at(r, c) = 0;
        }
      }
    }
    w.accumulate(x, grad, p.part * kColumns, dv);
    w.accumulate(slope, q, p.part * kColumns, dk);
  });

  float scale[kRows], one[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    scale[r] = BUG("attention.dk_not_scaled") ? 1.0f : a.scale;
    one[r] = 1;
  }
  const int begin = p.part * kColumns, count = min(max(p.rows - w.first, 0), W::kWarpRows);
  const int64_t end = a.dim < begin + kColumns ? a.dim : begin + kColumns;
  w.put(dk, scale, m.own(0), begin);
  w.put(dv, one, m.own(1), begin);
  store_rows(m.own(0), w.first, count, at<T>(a.dk, p.s, p.first + w.first, p.head), a.dk.token, begin, end,
             in_chunks<T>(a.dk, a.dim));
  store_rows(m.own(1), w.first, count, at<T>(a.dv, p.s, p.first + w.first, p.head), a.dv.token, begin, end,
             in_chunks<T>(a.dv, a.dim));
}

}  // namespace finetune::attention
