// Online softmax of a tile of scores in registers (Milakov & Gimelshein 2018, arXiv:1805.02867): what every forward
// kernel of attention does between its two products.
//
// Of S (rows, columns), a lane has kRows rows and some columns, s.at(r, c). With x = q·k and f = scale log2(e), per
// row:
//   m' = max(m, max x),   p = 2^(f x − f m'),   l' = 2^(f m − f m') l + Σ p,   acc' = 2^(f m − f m') acc
// The scale is folded into the exponent's FMA, and the mask runs only on tiles that have one: a score costs one FMNMX,
// one FFMA, one MUFU and one FADD.
#pragma once

#include "attention_common.cuh"

namespace finetune::attention {

// f, for the maximum is taken of products: it must be positive. From a negative scale the sign goes to the products
// first, and 0 (or NaN) is multiplied in. With a softcap the maximum is that of their tanh, and f is c log2(e).
struct ScaleLog2 {
  bool capped;
  float scale, factor;
  __device__ ScaleLog2(const AttentionSizes& a, bool rules)
      : capped(rules && a.softcap > 0),
        scale(capped ? a.scale / a.softcap : a.scale * kLog2e),
        factor(capped      ? a.softcap * kLog2e
               : scale > 0 ? scale
               : scale < 0 ? -scale
                           : 1.0f) {}
  __device__ bool positive() const { return scale > 0; }
  __device__ float product(float x) const { return scale < 0 ? -x : x * scale; }  // where not positive()
};

// 2^(f x − f m) is one FMA and the exponential where |f m| is at most this. The rounding of f m then stays in the
// result: 2^−18, which the rounding of P to 16 bits does not see. Where f m is larger the product rounds as f m did, so
// that P is 1 at the maximum, o is that key's v, and dP − delta is exactly 0 where nothing else is seen.
constexpr float kFused = 64;

template <int kRows>
struct OnlineSoftmax {
  ScaleLog2 f;
  float m[kRows];  // maximum of the products so far
  float l[kRows];  // sum of this lane's columns of P so far; joined over the row's lanes at the end

  __device__ OnlineSoftmax(const AttentionSizes& a, bool rules) : f(a, rules) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) m[r] = -INFINITY, l[r] = 0;
  }

  // S becomes P; acc is rescaled. `masked`: does this tile have scores that visible(r, c) denies? over_row joins a
  // value of each of the lanes that share a row.
  template <class S, class Acc, class Visible, class OverRow>
  __device__ __forceinline__ void step(S& s, Acc& acc, bool masked, Visible&& visible, OverRow&& over_row) {
    if (f.capped) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < S::kColumns; ++c) s.at(r, c) = hyperbolic_tangent(s.at(r, c) * f.scale);
      }
    } else if (!f.positive()) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < S::kColumns; ++c) s.at(r, c) = f.product(s.at(r, c));
      }
    }
    if (masked) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < S::kColumns; ++c) {
          if (!visible(r, c)) s.at(r, c) = -INFINITY;
        }
      }
    }
    float base[kRows];  // f m'
    bool small = true;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float highest = m[r];
#pragma unroll
      for (int c = 0; c < S::kColumns; ++c) highest = fmaxf(highest, s.at(r, c));
      highest = over_row(highest, [](float x, float y) { return fmaxf(x, y); });
      base[r] = highest == -INFINITY ? 0.0f : __fmul_rn(highest, f.factor);  // nothing visible yet: avoid inf − inf
      small = small && fabsf(base[r]) <= kFused;
      const float rescale = ptx::exp2(__fmul_rn(m[r], f.factor) - base[r]);
      m[r] = highest;
      l[r] *= rescale;
#pragma unroll
      for (int c = 0; c < Acc::kColumns; ++c) acc.at(r, c) *= rescale;
    }
    const auto exponentials = [&](auto&& exponent) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float sum = 0;
#pragma unroll
        for (int c = 0; c < S::kColumns; ++c) {
          float& x = s.at(r, c);
          x = ptx::exp2(exponent(x, base[r]));
          sum += x;
        }
        l[r] += sum;
      }
    };
    if (__all_sync(0xffffffffu, small)) {
      exponentials([&](float x, float base) { return fmaf(x, f.factor, -base); });
    } else {
      exponentials([&](float x, float base) { return __fmul_rn(x, f.factor) - base; });
    }
  }

  // Joins l over the row's lanes. Row r of the result is then acc / l, and its statistics log2_max(r) and l.
  template <class OverRow>
  __device__ __forceinline__ void finish(OverRow&& over_row) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) l[r] = over_row(l[r], [](float x, float y) { return x + y; });
  }
  __device__ float log2_max(int r) const { return __fmul_rn(m[r], f.factor); }
  __device__ float inverse_sum(int r) const { return l[r] == 0 ? 0.0f : 1 / l[r]; }
};

}  // namespace finetune::attention
