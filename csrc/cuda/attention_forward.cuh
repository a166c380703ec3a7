// Attention's forward pass; the maths is in attention.cu.
#pragma once

#include "attention_softmax.cuh"
#include "attention_warp.cuh"

namespace finetune::attention {

// A forward block's shared memory: q, then k and v of each stage, then the warps' scratch.
template <class T, int D>
struct ForwardMemory {
  using W = Warp<T, D>;
  static constexpr size_t kScratch = (W::kOwn + 2 * W::kStages * W::kStream) * D * sizeof(T),
                          kBytes = kScratch + W::kScratch;
  unsigned char* memory;

  __device__ Tile<T, D> q() const { return {reinterpret_cast<T*>(memory)}; }
  __device__ Tile<T, D> k(int stage) const { return {q().data + (W::kOwn + 2 * stage * W::kStream) * D}; }
  __device__ Tile<T, D> v(int stage) const { return {k(stage).data + W::kStream * D}; }
  __device__ unsigned char* scratch() const { return memory + kScratch; }
};

// Algorithm 1 of a tile of `rows` queries, which load_q() copies, and the keys [begin, end) of one key/value head. Row
// r of a lane sees the keys before limit[r]; all rows see those before `least`, so only tiles past it have a mask.
template <class T, int D, class LoadQ>
__device__ __forceinline__ void attend(const AttentionCuda& a, const ForwardMemory<T, D>& memory, const Warp<T, D>& w,
                                       const Sequence& s, int kv_head, int rows, int begin, int end, int least,
                                       const int (&limit)[Warp<T, D>::kRows], LoadQ&& load_q,
                                       OnlineSoftmax<Warp<T, D>::kRows>& softmax,
                                       typename Warp<T, D>::template Matrix<D>& acc) {
  using W = Warp<T, D>;
  constexpr int N = W::kStream;
  const bool chunks_k = in_chunks<T>(a.k, a.dim), chunks_v = in_chunks<T>(a.v, a.dim);
  const auto load = [&](int n, int stage) {
    const int key = begin + n * N;
    if (n == 0) load_q();
    load_tile<N>(memory.k(stage), at<const T>(a.k, s, key, kv_head), a.k.token, end - key, a.dim, chunks_k);
    load_tile<N>(memory.v(stage), at<const T>(a.v, s, key, kv_head), a.v.token, end - key, a.dim, chunks_v);
  };
  const auto over_row = [&](float x, auto&& join) { return w.over_row(x, join); };
  pipeline<W::kStages>(static_cast<int>(ceil_div(max(end - begin, 0), N)), load, [&](int n, int stage) {
    if (w.first >= rows) return;  // none of the rows is this warp's
    typename W::template Matrix<N> scores;
    w.multiply(memory.q(), memory.k(stage), scores);
    const int key = begin + n * N, seen = BUG("attention.no_tail_mask") ? least + N - 1 : least;
    const auto visible = [&](int r, int c) { return key + w.column(c) < limit[r]; };
    softmax.step(scores, acc, key + N > seen, visible, over_row);
    w.accumulate(scores, memory.v(stage), 0, acc);
  });
  softmax.finish(over_row);
}

// A block per tile of queries of one head.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) forward(AttentionCuda a) {
  using W = Warp<T, D>;
  constexpr int kRows = W::kRows;
  DYN_SHARED(unsigned char, shared);
  const ForwardMemory<T, D> memory{shared};
  const Place p = place(a, gridDim.x - 1 - blockIdx.x, false, W::kOwn, 1);  // long causal rows first
  if (!p.rows) return;
  const W w(memory.scratch());
  const int heads = static_cast<int>(a.kv_heads), group = static_cast<int>(a.heads) / heads;
  const int kv_head = BUG("attention.wrong_kv_head") ? p.head % heads : p.head / group;
  const int least = p.s.limit(p.first), most = p.s.limit(p.first + p.rows - 1);
  int limit[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) limit[r] = p.s.limit(min(p.first + w.row(r), p.s.queries - 1));
  const auto load_q = [&] {
    load_tile<W::kOwn>(memory.q(), at<const T>(a.q, p.s, p.first, p.head), a.q.token, p.rows, a.dim,
                       in_chunks<T>(a.q, a.dim));
  };
  OnlineSoftmax<kRows> softmax(a.scale);
  typename W::template Matrix<D> acc;
  attend<T, D>(a, memory, w, p.s, kv_head, p.rows, 0, most, least, limit, load_q, softmax, acc);

  float factor[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    factor[r] = softmax.inverse_sum(r);
    const int row = w.row(r);
    if (w.column(0) == 0 && row < p.rows) {
      const int64_t i = row_index(a, p.s, p.head, p.first + row);
      a.top[i] = softmax.log2_max(r);
      a.total[i] = softmax.l[r];
    }
  }
  w.put(acc, factor, memory.q(), 0);
  const int rows = p.rows + (BUG("attention.past_the_end") ? 1 : 0);
  store_rows(memory.q(), w.first, min(max(rows - w.first, 0), W::kWarpRows), at<T>(a.o, p.s, p.first + w.first, p.head),
             a.o.token, 0, a.dim, in_chunks<T>(a.o, a.dim));
}

}  // namespace finetune::attention
