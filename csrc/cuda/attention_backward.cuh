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

// Shared memory of both kernels: the two tiles that the block holds (q and dO, or k and v), the two that it loops over
// with their rows' statistics for each stage, the warps' scratch.
template <class T, int D>
struct BackwardMemory {
  using W = Warp<T, D>;
  static constexpr int N = W::kBackwardStep;
  static constexpr int kRowsOfO = W::kBlockRows > W::kDiagonal ? W::kBlockRows : W::kDiagonal;  // where k and v will be
  static_assert(2 * W::kStages * N >= kRowsOfO);
  static constexpr size_t kBlockBytes = W::kBlockRows * D * sizeof(T), kStepBytes = N * D * sizeof(T),
                          kStatistics = 2 * kBlockBytes + 2 * W::kStages * kStepBytes,
                          kScratch = kStatistics + W::kStages * N * sizeof(AttentionRow),
                          kBytes = kScratch + W::kScratch;
  unsigned char* memory;

  __device__ Tile<T, D> held(int which) const { return {reinterpret_cast<T*>(memory + which * kBlockBytes)}; }
  __device__ Tile<T, D> step(int which, int stage) const {
    return {reinterpret_cast<T*>(memory + 2 * kBlockBytes + (2 * stage + which) * kStepBytes)};
  }
  __device__ AttentionRow* rows(int stage) const {
    return reinterpret_cast<AttentionRow*>(memory + kStatistics) + stage * N;
  }
  __device__ unsigned char* scratch() const { return memory + kScratch; }
};

// A block per tile of BLOCK_M queries; it loops over tiles of BLOCK_N keys:
//   S = Q Kᵀ,   dP = dO Vᵀ,   dS = P ∘ (dP − delta),   dQ += dS K.
// With a softcap dS is multiplied by 1 − tanh².
// delta = dO · O comes from the products that make dP, and so in their order: where a row's P is 1 at one key and 0
// elsewhere, they cancel to the bit, as they should. It is left in a.rows for backward_keys.
template <class T, int D, int kRules>
__global__ void __launch_bounds__(kThreads, 1) backward_queries(AttentionBackwardCuda a) {
  using W = Warp<T, D>;
  constexpr int BLOCK_M = W::kBlockRows, BLOCK_N = W::kBackwardStep, kRows = W::kRows;
  DYN_SHARED(unsigned char, shared);
  const BackwardMemory<T, D> memory{shared};
  const WorkTile work = work_tile(a, gridDim.x - 1 - blockIdx.x, false, BLOCK_M, 1, kRules);
  if (!work.rows) return;
  const W w(memory.scratch());

  const int kv_head = work.head / static_cast<int>(a.heads / a.kv_heads);
  const int least = work.s.limit(work.first), most = work.s.limit(work.first + work.rows - 1);
  const int begin = work.s.passed(work.first), most_passed = work.s.passed(work.first + work.rows - 1);
  const bool chunks_k = in_chunks<T>(a.k, a.dim), chunks_v = in_chunks<T>(a.v, a.dim);
  const auto load = [&](int n, int stage) {
    const int key = begin + n * BLOCK_N;
    load_tile<BLOCK_N>(memory.step(0, stage), at<const T>(a.k, work.s, key, kv_head), a.k.token, most - key, a.dim,
                       chunks_k);
    load_tile<BLOCK_N>(memory.step(1, stage), at<const T>(a.v, work.s, key, kv_head), a.v.token, most - key, a.dim,
                       chunks_v);
  };

  const Tile<T, D> o = memory.step(0, 0);  // until the first keys come
  load_tile<BLOCK_M>(memory.held(0), at<const T>(a.q, work.s, work.first, work.head), a.q.token, work.rows, a.dim,
                     in_chunks<T>(a.q, a.dim));
  load_tile<BLOCK_M>(memory.held(1), at<const T>(a.grad_o, work.s, work.first, work.head), a.grad_o.token, work.rows,
                     a.dim, in_chunks<T>(a.grad_o, a.dim));
  load_tile<BackwardMemory<T, D>::kRowsOfO>(o, at<const T>(a.o, work.s, work.first, work.head), a.o.token, work.rows,
                                            a.dim, in_chunks<T>(a.o, a.dim));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  typename W::template Matrix<W::kDiagonal> dots;  // of the warp's rows of dO with rows of O, among them the same ones
  const int other = w.diagonal();
  w.multiply(memory.held(1), Tile<T, D>{o.data + other * D}, dots);

  const auto query = [&](int r) { return min(work.first + w.row(r), work.s.queries - 1); };
  const auto passed = [&](int r) { return work.s.passed(query(r)); };
  int limit[kRows];
  AttentionRow rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = w.row(r);
    limit[r] = work.s.limit(query(r));
    float delta = 0;
#pragma unroll
    for (int c = 0; c < dots.kColumns; ++c) delta = other + w.column(c) == row ? dots.at(r, c) : delta;
    delta = w.over_row(delta, [](float x, float y) { return x + y; });
    rows[r] = {0, 0, delta, 0};
    if (row >= work.rows) continue;
    const int64_t i = row_index(a, work.s, work.head, work.first + row);
    if (a.l[i] != 0) rows[r].m = a.m[i], rows[r].inverse_l = 1 / a.l[i];
    if (w.column(0) == 0) a.rows[i] = rows[r];
  }
  __syncthreads();

  const Score score(a, kRules);
  typename W::template Matrix<D> dq;
  pipeline<W::kStages>(static_cast<int>(ceil_div(max(most - begin, 0), BLOCK_N)), load, [&](int n, int stage) {
    const Tile<T, D> k = memory.step(0, stage), v = memory.step(1, stage);
    const int key = begin + n * BLOCK_N;
    bool whole = key + BLOCK_N <= least && (!kRules || key >= most_passed);
    typename W::template Matrix<BLOCK_N> p, ds;  // S; dP, then dS
    const auto visible = [&](int r, int c) {
      const int j = key + w.column(c);
      return j < limit[r] && (!kRules || j >= passed(r));
    };
    Shown shown;
    if constexpr (kRules == kMask) {
      shown.find<kRows, p.kColumns>(
          [&](int r, int c) { return visible(r, c) && mask_row(a, work.s, query(r))[key + w.column(c)]; });
      if (!shown.any()) return;
      whole = shown.all();
    }
    w.multiply(memory.held(0), k, p);
    w.multiply(memory.held(1), v, ds);
    const auto gradient = [&](auto capped) {
      constexpr bool kCapped = decltype(capped)::value;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < p.kColumns; ++c) {
          const float x = kCapped ? hyperbolic_tangent(p.at(r, c) * score.scale) : p.at(r, c);
          const float weight = ptx::exp2(__fmul_rn(x, score.factor) - rows[r].m) * rows[r].inverse_l;
          ds.at(r, c) = weight * (ds.at(r, c) - rows[r].delta);
          if (kCapped) ds.at(r, c) *= fmaf(-x, x, 1.0f);
        }
      }
    };
    score.capped ? gradient(std::true_type{}) : gradient(std::false_type{});
    if (!whole) {  // the last tiles, and the first of a window
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < p.kColumns; ++c) {
          const bool seen = kRules == kMask ? shown.bits >> (r * p.kColumns + c) & 1 : visible(r, c);
          if (!seen) ds.at(r, c) = 0;
        }
      }
    }
    w.accumulate(ds, k, 0, dq);
  });

  float scale[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) scale[r] = a.scale;
  w.to_shared(dq, scale, memory.held(0), 0);
  store_rows(memory.held(0), w.first, min(max(work.rows - w.first, 0), W::kWarpRows),
             at<T>(a.dq, work.s, work.first + w.first, work.head), a.dq.token, 0, a.dim, in_chunks<T>(a.dq, a.dim));
}

// A block per tile of BLOCK_N keys of one key/value head; where a block's registers do not hold all columns (D = 256),
// for a part of them. It loops over tiles of BLOCK_M queries of all the heads that share it:
//   Sᵀ = K Qᵀ,   dPᵀ = V dOᵀ,   dV += Pᵀ dO,   dK += dSᵀ Q.
template <class T, int D, int kRules>
__global__ void __launch_bounds__(kThreads, 1) backward_keys(AttentionBackwardCuda a) {
  using W = Warp<T, D>;
  constexpr int BLOCK_M = W::kBackwardStep, BLOCK_N = W::kBlockRows, kRows = W::kRows, kColumns = W::kKeyColumns;
  DYN_SHARED(unsigned char, shared);
  const BackwardMemory<T, D> memory{shared};
  const WorkTile work = work_tile(a, blockIdx.x, true, BLOCK_N, D / kColumns, kRules);
  if (!work.rows) return;
  const W w(memory.scratch());

  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int real = min(max(work.s.keys - work.first, 0), work.rows);  // keys past the length get the gradient 0
  const int from = real ? min(work.s.since(work.first), work.s.queries) : work.s.queries;
  const int stop = kRules && real ? work.s.until(work.first + real - 1) : work.s.queries;
  const int to = kRules ? max(min(stop, work.s.queries), from) : stop;  // the rows [from, to) see a key of the tile
  const int steps = static_cast<int>(ceil_div(to - from, BLOCK_M));     // for each head
  const bool chunks_q = in_chunks<T>(a.q, a.dim), chunks_g = in_chunks<T>(a.grad_o, a.dim);
  const auto load = [&](int n, int stage) {
    if (n == 0) {
      load_tile<BLOCK_N>(memory.held(0), at<const T>(a.k, work.s, work.first, work.head), a.k.token, real, a.dim,
                         in_chunks<T>(a.k, a.dim));
      load_tile<BLOCK_N>(memory.held(1), at<const T>(a.v, work.s, work.first, work.head), a.v.token, real, a.dim,
                         in_chunks<T>(a.v, a.dim));
    }
    const int head = work.head * group + n / steps;
    const int query = from + n % steps * BLOCK_M, left = to - query;
    const T* const q = at<const T>(a.q, work.s, query, head);
    if constexpr (kRules == kMask) {  // what a query holds that sees no key is not multiplied, not by 0 either
      const float* const l = a.l + row_index(a, work.s, head, query);
      load_rows<BLOCK_M>(
          memory.step(0, stage), [=](int row) { return q + row * a.q.token; },
          [=](int row) { return row < left && l[row] != 0; }, a.dim, chunks_q);
    } else {
      load_tile<BLOCK_M>(memory.step(0, stage), q, a.q.token, left, a.dim, chunks_q);
    }
    load_tile<BLOCK_M>(memory.step(1, stage), at<const T>(a.grad_o, work.s, query, head), a.grad_o.token, left, a.dim,
                       chunks_g);
    const AttentionRow* const rows = a.rows + row_index(a, work.s, head, query);
    for (int i = threadIdx.x; i < BLOCK_M; i += kThreads) {
      ptx::cp_async16(memory.rows(stage) + i, i < left ? rows + i : a.rows, i < left);
    }
  };

  int since[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) since[r] = w.row(r) < real ? work.s.since(work.first + w.row(r)) : 0x7fffffff;
  const auto until = [&](int r) { return work.s.until(work.first + w.row(r)); };
  const int least_until = work.s.until(work.first);
  const Score score(a, kRules);
  typename W::template Matrix<kColumns> dk, dv;
  pipeline<W::kStages>(group * steps, load, [&](int n, int stage) {
    const Tile<T, D> q = memory.step(0, stage), grad = memory.step(1, stage);
    const int query = from + n % steps * BLOCK_M;
    const bool after = query >= work.s.since(work.first + real - 1);
    bool whole = real == BLOCK_N && after && (!kRules || query <= least_until - BLOCK_M);
    typename W::template Matrix<BLOCK_M> p, ds;  // Sᵀ, then Pᵀ; dPᵀ, then dSᵀ
    const auto visible = [&](int r, int c) {
      const int i = query + w.column(c);
      return i >= since[r] && (!kRules || i < until(r));
    };
    Shown shown;
    if constexpr (kRules == kMask) {
      shown.find<kRows, p.kColumns>([&](int r, int c) {
        const int i = query + w.column(c);
        return i < to && visible(r, c) && mask_row(a, work.s, i)[work.first + w.row(r)];
      });
      if (!shown.any()) return;
      whole = shown.all();
    }
    w.multiply(memory.held(0), q, p);
    w.multiply(memory.held(1), grad, ds);
    const auto gradient = [&](auto capped) {
      constexpr bool kCapped = decltype(capped)::value;
#pragma unroll
      for (int c = 0; c < p.kColumns; ++c) {
        const AttentionRow row = memory.rows(stage)[w.column(c)];  // 0, and so inverse_l, past the last query
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float x = kCapped ? hyperbolic_tangent(p.at(r, c) * score.scale) : p.at(r, c);
          p.at(r, c) = ptx::exp2(__fmul_rn(x, score.factor) - row.m) * row.inverse_l;
          ds.at(r, c) = p.at(r, c) * (ds.at(r, c) - row.delta);
          if (kCapped) ds.at(r, c) *= fmaf(-x, x, 1.0f);
        }
      }
    };
    score.capped ? gradient(std::true_type{}) : gradient(std::false_type{});
    if (!whole) {  // the first tiles, the last keys, and the last tiles of a window
#pragma unroll
      for (int c = 0; c < p.kColumns; ++c) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const bool seen = kRules == kMask ? shown.bits >> (r * p.kColumns + c) & 1 : visible(r, c);
          if (!seen) p.at(r, c) = ds.at(r, c) = 0;
        }
      }
    }
    w.accumulate(p, grad, work.part * kColumns, dv);
    w.accumulate(ds, q, work.part * kColumns, dk);
  });

  float scale[kRows], one[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    scale[r] = a.scale;
    one[r] = 1;
  }
  const int begin = work.part * kColumns, count = min(max(work.rows - w.first, 0), W::kWarpRows);
  const int64_t end = a.dim < begin + kColumns ? a.dim : begin + kColumns;
  w.to_shared(dk, scale, memory.held(0), begin);
  w.to_shared(dv, one, memory.held(1), begin);
  store_rows(memory.held(0), w.first, count, at<T>(a.dk, work.s, work.first + w.first, work.head), a.dk.token, begin,
             end, in_chunks<T>(a.dk, a.dim));
  store_rows(memory.held(1), w.first, count, at<T>(a.dv, work.s, work.first + w.first, work.head), a.dv.token, begin,
             end, in_chunks<T>(a.dv, a.dim));
}

}  // namespace finetune::attention
