// Attention's forward pass; the maths is in attention.cu.
#pragma once

#include "attention_softmax.cuh"
#include "attention_warp.cuh"

namespace finetune::attention {

// A forward block's shared memory: q, then k and v of each stage, then the warps' scratch.
template <class T, int D>
struct ForwardMemory {
  using W = Warp<T, D>;
  static constexpr size_t kScratch = (W::kBlockRows + 2 * W::kStages * W::kStep) * D * sizeof(T),
                          kBytes = kScratch + W::kScratch;
  unsigned char* memory;

  __device__ Tile<T, D> q() const { return {reinterpret_cast<T*>(memory)}; }
  __device__ Tile<T, D> k(int stage) const { return {q().data + (W::kBlockRows + 2 * stage * W::kStep) * D}; }
  __device__ Tile<T, D> v(int stage) const { return {k(stage).data + W::kStep * D}; }
  __device__ unsigned char* scratch() const { return memory + kScratch; }
};

// Algorithm 1 of a tile of `rows` queries, which load_q() copies, and the keys [begin, end) of one key/value head. Row
// r of a lane sees the keys from passed(r) to limit[r], of them those that the mask's row of query(r) shows, if there is
// one; all rows see those from `most_passed` to `least`, so without a mask only tiles that reach beyond hide any. A warp
// whose rows a mask shows nothing of a tile does not multiply it.
template <class T, int D, int kRules, class Query, class Passed, class LoadQ>
__device__ __forceinline__ void attend(const AttentionCuda& a, const ForwardMemory<T, D>& memory, const Warp<T, D>& w,
                                       const Sequence& s, int kv_head, int rows, int begin, int end, int most_passed,
                                       int least, Query&& query, Passed&& passed, const int (&limit)[Warp<T, D>::kRows],
                                       LoadQ&& load_q, OnlineSoftmax<Warp<T, D>::kRows>& softmax,
                                       typename Warp<T, D>::template Matrix<D>& acc) {
  using W = Warp<T, D>;
  constexpr bool kFew = kRules && D > 128 && sizeof(T) == 2;  // registers: the bounds and the tanh take more of them
  constexpr int BLOCK_N = kFew ? W::kStep / 2 : W::kStep;
  const bool chunks_k = in_chunks<T>(a.k, a.dim), chunks_v = in_chunks<T>(a.v, a.dim);
  const auto load = [&](int n, int stage) {
    const int key = begin + n * BLOCK_N;
    if (n == 0) load_q();
    load_tile<BLOCK_N>(memory.k(stage), at<const T>(a.k, s, key, kv_head), a.k.token, end - key, a.dim, chunks_k);
    load_tile<BLOCK_N>(memory.v(stage), at<const T>(a.v, s, key, kv_head), a.v.token, end - key, a.dim, chunks_v);
  };
  const auto over_row = [&](float x, auto&& join) { return w.over_row(x, join); };
  pipeline<W::kStages>(static_cast<int>(ceil_div(max(end - begin, 0), BLOCK_N)), load, [&](int n, int stage) {
    if (w.first >= rows) return;  // none of the rows is this warp's
    typename W::template Matrix<BLOCK_N> scores;
    const int key = begin + n * BLOCK_N;
    const auto visible = [&](int r, int c) {
      const int j = key + w.column(c);
      return j < limit[r] && (!kRules || j >= passed(r));
    };
    const auto add = [&](bool masked, auto&& visible) {
      w.multiply(memory.q(), memory.k(stage), scores);
      softmax.step(scores, acc, masked, visible, over_row);
    };
    if constexpr (kRules == kMask) {
      constexpr int kColumns = decltype(scores)::kColumns;
      Shown shown;
      shown.find<W::kRows, kColumns>(
          [&](int r, int c) { return visible(r, c) && mask_row(a, s, query(r))[key + w.column(c)]; });
      if (!shown.any()) return;
      add(!shown.all(), [&](int r, int c) { return shown.bits >> (r * kColumns + c) & 1; });
    } else {
      add(key + BLOCK_N > least || (kRules && key < most_passed), visible);
    }
    w.accumulate(scores, memory.v(stage), 0, acc);
  });
  softmax.finish(over_row);
}

// A block per tile of BLOCK_M queries of one head.
template <class T, int D, int kRules>
__global__ void __launch_bounds__(kThreads, 1) forward(AttentionCuda a) {
  using W = Warp<T, D>;
  constexpr int BLOCK_M = W::kBlockRows, kRows = W::kRows;
  DYN_SHARED(unsigned char, shared);
  const ForwardMemory<T, D> memory{shared};
  const WorkTile work = work_tile(a, gridDim.x - 1 - blockIdx.x, false, BLOCK_M, 1, kRules);  // long causal rows first
  if (!work.rows) return;
  const W w(memory.scratch());
  const int kv_head = work.head / static_cast<int>(a.heads / a.kv_heads);
  const int least = work.s.limit(work.first), most = work.s.limit(work.first + work.rows - 1);
  const int begin = work.s.passed(work.first), most_passed = work.s.passed(work.first + work.rows - 1);
  const auto query = [&](int r) { return min(work.first + w.row(r), work.s.queries - 1); };
  const auto passed = [&](int r) { return work.s.passed(query(r)); };
  int limit[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) limit[r] = work.s.limit(query(r));
  const auto load_q = [&] {
    load_tile<BLOCK_M>(memory.q(), at<const T>(a.q, work.s, work.first, work.head), a.q.token, work.rows, a.dim,
                       in_chunks<T>(a.q, a.dim));
  };
  OnlineSoftmax<kRows> softmax(a, kRules);
  typename W::template Matrix<D> acc;
  attend<T, D, kRules>(a, memory, w, work.s, kv_head, work.rows, begin, most, most_passed, least, query, passed, limit,
                       load_q, softmax, acc);

  float factor[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    factor[r] = softmax.inverse_sum(r);
    const int row = w.row(r);
    if (w.column(0) == 0 && row < work.rows) {
      const int64_t i = row_index(a, work.s, work.head, work.first + row);
      a.m[i] = softmax.log2_max(r);
      a.l[i] = softmax.l[r];
    }
  }
  w.to_shared(acc, factor, memory.q(), 0);
  store_rows(memory.q(), w.first, min(max(work.rows - w.first, 0), W::kWarpRows),
             at<T>(a.o, work.s, work.first + w.first, work.head), a.o.token, 0, a.dim, in_chunks<T>(a.o, a.dim));
}

}  // namespace finetune::attention
