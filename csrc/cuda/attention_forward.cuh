// Attention's forward pass; the maths is in attention.cu.
#pragma once

#include "attention_softmax.cuh"
#include "attention_warp.cuh"

namespace finetune::attention {

template <class T, int D>
constexpr size_t kForwardBytes =
    (Warp<T, D>::kOwn + 2 * Warp<T, D>::kStages * Warp<T, D>::kStream) * D * sizeof(T) + Warp<T, D>::kScratch;

// A block per tile of queries of one head. Shared memory: q, then k and v of each stage, then the warps' scratch.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) forward(AttentionCuda a) {
  using W = Warp<T, D>;
  constexpr int N = W::kStream, kRows = W::kRows;
  DYN_SHARED(unsigned char, memory);
  const Place p = place(a, gridDim.x - 1 - blockIdx.x, false, W::kOwn, 1);  // long causal rows first
  if (!p.rows) return;
  const Tile<T, D> q{reinterpret_cast<T*>(memory)};
  const auto k = [=](int stage) { return Tile<T, D>{q.data + (W::kOwn + 2 * stage * N) * D}; };
  const auto v = [=](int stage) { return Tile<T, D>{k(stage).data + N * D}; };
  const W w(memory + kForwardBytes<T, D> - W::kScratch);

  const int heads = static_cast<int>(a.kv_heads), group = static_cast<int>(a.heads) / heads;
  const int kv_head = BUG("attention.wrong_kv_head") ? p.head % heads : p.head / group;
  const int least = p.s.limit(p.first), most = p.s.limit(p.first + p.rows - 1);
  const bool chunks_k = in_chunks<T>(a.k, a.dim), chunks_v = in_chunks<T>(a.v, a.dim);
  const auto load = [&](int n, int stage) {
    const int key = n * N;
    if (n == 0) {
      load_tile<W::kOwn>(q, at<const T>(a.q, p.s, p.first, p.head), a.q.token, p.rows, a.dim, in_chunks<T>(a.q, a.dim));
    }
    load_tile<N>(k(stage), at<const T>(a.k, p.s, key, kv_head), a.k.token, most - key, a.dim, chunks_k);
    load_tile<N>(v(stage), at<const T>(a.v, p.s, key, kv_head), a.v.token, most - key, a.dim, chunks_v);
  };

  const auto over_row = [&](float x, auto&& join) { return w.over_row(x, join); };
  int limit[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) limit[r] = p.s.limit(min(p.first + w.row(r), p.s.queries - 1));
  OnlineSoftmax<kRows> softmax(a.scale);
  typename W::template Matrix<D> acc;
  pipeline<W::kStages>(static_cast<int>(ceil_div(most, N)), load, [&](int n, int stage) {
    typename W::template Matrix<N> s;
    w.multiply(q, k(stage), s);
    const int key = n * N, seen = BUG("attention.no_tail_mask") ? least + N - 1 : least;
    const auto visible = [&](int r, int c) { return key + w.column(c) < limit[r]; };
    softmax.step(s, acc, key + N > seen, visible, over_row);  // masked: the last tiles alone
    w.accumulate(s, v(stage), 0, acc);
  });

  softmax.finish(over_row);
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
  w.put(acc, factor, q, 0);
  const int rows = p.rows + (BUG("attention.past_the_end") ? 1 : 0);
  store_rows(q, w.first, min(max(rows - w.first, 0), W::kWarpRows), at<T>(a.o, p.s, p.first + w.first, p.head),
             a.o.token, 0, a.dim, in_chunks<T>(a.o, a.dim));
}

}  // namespace finetune::attention
