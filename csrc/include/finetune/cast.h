// Conversion between floating-point formats; the definition is finetune/ops/cast.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

// The formats of `cast`, by exponent bits, mantissa bits and whether they lack infinities (all ones is then the only
// NaN). OCP 8-bit Floating Point Specification 1.0 for the last two.
enum class Format : int { f32, bf16, f16, e4m3, e5m2 };

struct Cast {
  Format from, to;
  const void* x;
  void* y;
  int64_t size;
  float scale;                // multiplies x before rounding
  const float* scale_tensor;  // CUDA only, may be null: a number in device memory that multiplies x too
  bool stochastic;            // up with the probability that keeps the mean, else to nearest, ties to even
  uint64_t seed;
  bool saturate;  // what is too large becomes the largest finite number, else infinity (e4m3: NaN)
};

template <int kExponent, int kMantissa, bool kFinite>
struct Layout {
  static constexpr int exponent = kExponent, mantissa = kMantissa;
  static constexpr int bias = (1 << (kExponent - 1)) - 1, drop = 23 - kMantissa;
  static constexpr uint32_t sign = 1u << (kExponent + kMantissa);
  static constexpr uint32_t beyond = sign - 1 - (kFinite ? 0 : (1u << kMantissa) - 1);  // infinity, or NaN
  static constexpr uint32_t largest = beyond - 1;
  static constexpr uint32_t nan = kExponent + kMantissa == 7 ? sign - 1 : beyond | 1u << (kMantissa - 1);
};
template <Format kFormat>
struct LayoutOf;
template <>
struct LayoutOf<Format::bf16> : Layout<8, 7, false> {};
template <>
struct LayoutOf<Format::f16> : Layout<5, 10, false> {};
template <>
struct LayoutOf<Format::e4m3> : Layout<4, 3, true> {};
template <>
struct LayoutOf<Format::e5m2> : Layout<5, 2, false> {};

}  // namespace finetune
