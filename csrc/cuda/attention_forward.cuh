// Attention's forward pass; the maths is in attention.cu.
#pragma once

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

  int limit[kRows];
  float top[kRows], total[kRows];  // `total`: of this lane's columns until the end
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    limit[r] = p.s.limit(min(p.first + w.row(r), p.s.queries - 1));
    top[r] = -INFINITY;
    total[r] = 0;
  }
  typename W::template Matrix<D> o;
  pipeline<W::kStages>(static_cast<int>(ceil_div(most, N)), load, [&](int n, int stage) {
    typename W::template Matrix<N> s;
    w.multiply(q, k(stage), s);
    const int key = n * N, seen = BUG("attention.no_tail_mask") ? least + N - 1 : least;
    const bool whole = key + N <= seen;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float highest = top[r];
#pragma unroll
      for (int c = 0; c < s.kColumns; ++c) {
        float& x = s.at(r, c);
        x = __fmul_rn(x, a.scale * kLog2e);
        if (!whole && key + w.column(c) >= limit[r]) x = -INFINITY;
        highest = fmaxf(highest, x);
      }
      if (!BUG("attention.row_maximum_of_a_lane")) {
        highest = w.over_row(highest, [](float x, float y) { return fmaxf(x, y); });
      }
      const float base = highest == -INFINITY ? 0.0f : highest;  // nothing visible yet: avoid inf − inf
      const float rescale = BUG("attention.no_rescale") ? 1.0f : ptx::exp2(top[r] - base);
      float sum = 0;
#pragma unroll
      for (int c = 0; c < s.kColumns; ++c) {
        float& x = s.at(r, c);
        x = ptx::exp2(x - base);
        sum += x;
      }
      top[r] = highest;
      total[r] = total[r] * (BUG("attention.total_not_rescaled") ? 1.0f : rescale) + sum;
#pragma unroll
      for (int c = 0; c < o.kColumns; ++c) o.at(r, c) *= rescale;
    }
    w.accumulate(s, v(stage), 0, o);
  });

  float factor[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    total[r] = w.over_row(total[r], [](float x, float y) { return x + y; });
    factor[r] = total[r] == 0 ? 0.0f : 1 / total[r];
    const int row = w.row(r);
    if (w.column(0) == 0 && row < p.rows) {
      const int64_t i = row_index(a, p.s, p.head, p.first + row);
      a.top[i] = top[r];
      a.total[i] = total[r];
    }
  }
  w.put(o, factor, q, 0);
  const int rows = p.rows + (BUG("attention.past_the_end") ? 1 : 0);
  store_rows(q, w.first, min(max(rows - w.first, 0), W::kWarpRows), at<T>(a.o, p.s, p.first + w.first, p.head),
             a.o.token, 0, a.dim, in_chunks<T>(a.o, a.dim));
}

}  // namespace finetune::attention
