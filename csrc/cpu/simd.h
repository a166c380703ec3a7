// Vectors of kLanes floats, by the compiler's own vector types, so that one source serves every level:
// the build compiles each kernel once a level with -DFINETUNE_LEVEL=<level> -DFINETUNE_LANES=<n>.
// Everything sits in the level's namespace: an inline function shared between levels would be merged by the
// linker, and a machine could then meet instructions it lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "finetune/kernel.h"

#define FINETUNE_INLINE inline __attribute__((always_inline))
#define FINETUNE_REGISTER(Args, kernel) static const Register<Args> registered_##Args(Level::FINETUNE_LEVEL, kernel)

namespace finetune::FINETUNE_LEVEL {

constexpr int kLanes = FINETUNE_LANES;
typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};

FINETUNE_INLINE vf set1(float x) { return x - vf{}; }  // not vf{} + x, which turns -0 into +0

FINETUNE_INLINE float to_float(float x) { return x; }
FINETUNE_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

FINETUNE_INLINE vf load(const float* p) {
  vf out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
FINETUNE_INLINE vf load(const bf16* p) {
  vh half;
  std::memcpy(&half, p, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

FINETUNE_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
FINETUNE_INLINE void store(bf16* p, vf x) {  // to nearest, ties to even; a NaN stays a (quiet) NaN
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  const vu nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
  const vh half = __builtin_convertvector((nan & quiet) | (~nan & rounded), vh);
  std::memcpy(p, &half, sizeof half);
}

// The first n < kLanes elements; the other lanes read as zero and are not written.
template <class T>
FINETUNE_INLINE vf load_part(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
FINETUNE_INLINE void store_part(T* p, vf x, int64_t n) {
  T buffer[kLanes];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}

// body(offset, load, store) for each vector of n elements, the tail included: `get(p)` and `put(p, x)` take
// pointers already advanced by offset.
template <class Body>
FINETUNE_INLINE void for_each_vector(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    body(i, [](auto* p) { return load(p); }, [](auto* p, vf x) { store(p, x); });
  }
  if (const int64_t rest = n - i) {
    body(i, [rest](auto* p) { return load_part(p, rest); }, [rest](auto* p, vf x) { store_part(p, x, rest); });
  }
}

FINETUNE_INLINE vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
FINETUNE_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }
FINETUNE_INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }

FINETUNE_INLINE vf vsqrt(vf x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

FINETUNE_INLINE float sum(vf x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}
FINETUNE_INLINE float max(vf x) {
  float top = x[0];
  for (int i = 1; i < kLanes; ++i) top = top > x[i] ? top : x[i];
  return top;
}

// e^x to about 1 ulp: x = n ln2 + r with |r| <= ln2/2, a degree-6 polynomial for e^r (Taylor with the error
// spread), and 2^n put into the exponent. Below -87.33 it is 0 (no denormals), above 88.72 infinity.
FINETUNE_INLINE vf vexp(vf x) {
  const vf shift = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (vmin(vmax(x, set1(-87.5f)), set1(88.75f)) * 1.44269504f + shift) - shift;
  const vf r = (vmin(vmax(x, set1(-87.5f)), set1(88.75f)) - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = set1(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two halves, so that n = 128 does not overflow the exponent field before the product does.
  const vi half = __builtin_convertvector(n, vi) >> 1;
  const vi rest = __builtin_convertvector(n, vi) - half;
  p = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
  p = select(x < -87.33f, vf{}, p);
  p = select(x > 88.7228f, set1(__builtin_inff()), p);
  return select(x != x, x, p);
}

}  // namespace finetune::FINETUNE_LEVEL
