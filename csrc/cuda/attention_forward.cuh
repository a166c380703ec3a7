// Attention's forward pass; the maths is in attention.cu.
#pragma once

#include "attention_warp.cuh"

namespace finetune::attention {

template <class T, int D>
constexpr size_t kForwardBytes =
    (Warp<T, D>::kOwn + 2 * Warp<T, D>::kStages * Warp<T, D>::kStream) * D * sizeof(T) + Warp<T, D>::kScratch;

// The row's maximum is taken of products x instead of scores s = scale log2(e) · x, which needs a factor above 0: from
// a negative scale the sign goes to the products, and 0 (or NaN) is multiplied in.
struct Factor {
  float scale, factor;
  __device__ explicit Factor(float scale_)
      : scale(scale_ * kLog2e),
        factor(scale > 0   ? scale
               : scale < 0 ? -scale
                           : 1.0f) {}
  __device__ bool plain() const { return scale > 0 || BUG("attention.sign_of_the_scale"); }
  __device__ float product(float x) const { return scale < 0 ? -x : x * scale; }  // where not plain()
};

// 2^(s − top) is one FMA and the exponential where |top| is at most this. The rounding of top then stays in the result:
// 2^−18, which the rounding of P to 16 bits does not see. Where top is larger the product rounds as top did, so that P
// is 1 at the maximum, o is that key's v, and dP − delta is exactly 0 where nothing else is seen.
constexpr float kFused = 64;

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

  const Factor f(a.scale);
  int limit[kRows];
  float top[kRows];    // of products, without the factor
  float total[kRows];  // of this lane's columns until the end
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
    if (!f.plain()) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < s.kColumns; ++c) s.at(r, c) = f.product(s.at(r, c));
      }
    }
    if (key + N > seen) {  // the last tiles; those before have no mask at all
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < s.kColumns; ++c) {
          if (key + w.column(c) >= limit[r]) s.at(r, c) = -INFINITY;
        }
      }
    }
    float base[kRows];
    bool small = true;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float highest = top[r];
#pragma unroll
      for (int c = 0; c < s.kColumns; ++c) highest = fmaxf(highest, s.at(r, c));
      if (!BUG("attention.row_maximum_of_a_lane")) {
        highest = w.over_row(highest, [](float x, float y) { return fmaxf(x, y); });
      }
      base[r] = highest == -INFINITY ? 0.0f : __fmul_rn(highest, f.factor);  // nothing visible yet: avoid inf − inf
      small = small && fabsf(base[r]) <= kFused;
      const float rescale = BUG("attention.no_rescale") ? 1.0f : ptx::exp2(__fmul_rn(top[r], f.factor) - base[r]);
      top[r] = highest;
      total[r] *= BUG("attention.total_not_rescaled") ? 1.0f : rescale;
#pragma unroll
      for (int c = 0; c < o.kColumns; ++c) o.at(r, c) *= rescale;
    }
    const auto powers = [&](auto&& score) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float sum = 0;
#pragma unroll
        for (int c = 0; c < s.kColumns; ++c) {
          float& x = s.at(r, c);
          x = ptx::exp2(score(x, base[r]));
          sum += x;
        }
        total[r] += sum;
      }
    };
    if (__all_sync(0xffffffffu, small || BUG("attention.always_fused"))) {
      powers([&](float x, float top) { return fmaf(x, f.factor, -top); });
    } else {
      powers([&](float x, float top) { return __fmul_rn(x, f.factor) - top; });
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
      a.top[i] = __fmul_rn(top[r], f.factor);
      a.total[i] = total[r];
    }
  }
  w.put(o, factor, q, 0);
  const int rows = p.rows + (BUG("attention.past_the_end") ? 1 : 0);
  store_rows(q, w.first, min(max(rows - w.first, 0), W::kWarpRows), at<T>(a.o, p.s, p.first + w.first, p.head),
             a.o.token, 0, a.dim, in_chunks<T>(a.o, a.dim));
}

}  // namespace finetune::attention
