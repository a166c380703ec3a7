// Vectors of kLanes floats, by the compiler's own vector types, so that one source serves every level:
// the build compiles each kernel once a level with -DFINETUNE_LEVEL=<level> -DFINETUNE_LANES=<n>.
// Everything sits in the level's namespace: an inline function shared between levels would be merged by the
// linker, and a machine could then meet instructions it lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
#if defined(__AVX512F__)  // gcc makes five instructions of the conversion below
  return (vf)((vu)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
#elif defined(__AVX2__)
  return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16);
#else
  vh half;
  std::memcpy(&half, p, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
#endif
}

FINETUNE_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
FINETUNE_INLINE void store(bf16* p, vf x) {  // to nearest, ties to even; a NaN stays a (quiet) NaN
  const vi bits = (vi)x;
#if defined(__AVX2__)
  const vi nan = (vi)(x != x);
#else  // by arithmetic: gcc splits a comparison that is wider than the machine's vectors into scalars
  const vi nan = (0x7f800000 - (bits & 0x7fffffff)) >> 31;
#endif
  const vu rounded = (vu)bits + 0x7fffu + (((vu)bits >> 16) & 1u);
  const vu top = (rounded | (vu)nan) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)  // two instructions instead of three
  const __m256i wide = (__m256i)top;
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#else
  const vh half = __builtin_convertvector(top, vh);
#endif
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
// b where either is a NaN. gcc may make several instructions of the loops, or one for each lane: they are for other
// machines.
FINETUNE_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
#endif
}
FINETUNE_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = a[i] < b[i] ? a[i] : b[i];
  return a;
#endif
}

FINETUNE_INLINE vf vsqrt(vf x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// Horizontal: fours of lanes first, which are a register on every machine, then by halves.
typedef float v4 __attribute__((vector_size(16)));
FINETUNE_INLINE float sum(vf x) {
  v4 part[kLanes / 4];
  std::memcpy(part, &x, sizeof x);
  for (int width = kLanes / 8; width; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}
FINETUNE_INLINE float max(vf x) {
  v4 part[kLanes / 4];
  std::memcpy(part, &x, sizeof x);
  for (int i = 1; i < kLanes / 4; ++i) {
    for (int j = 0; j < 4; ++j) part[0][j] = part[0][j] > part[i][j] ? part[0][j] : part[i][j];
  }
  const v4 top = part[0];
  const float even = top[0] > top[2] ? top[0] : top[2], odd = top[1] > top[3] ? top[1] : top[3];
  return even > odd ? even : odd;
}

// out[k] = Σ of what add(total, offset, load) adds to total[k], over the vectors of n elements, the tail included (its
// missing elements load as zero). In several sets of totals, so that an addition need not wait for the one before, but
// no more than the registers hold.
template <int kSums, class Add>
FINETUNE_INLINE void sum_vectors(int64_t n, float (&out)[kSums], Add&& add) {
#if defined(__AVX2__)
  constexpr int kSets = kSums <= 2 ? 4 : 2;
#else  // a vector is four registers
  constexpr int kSets = 1;
#endif
  vf total[kSets][kSums] = {};
  int64_t first = 0;
  for (; first + kSets * kLanes <= n; first += kSets * kLanes) {
    for (int j = 0; j < kSets; ++j) add(total[j], first + j * kLanes, [](auto* p) { return load(p); });
  }
  for_each_vector(n - first, [&](int64_t i, auto get, auto) { add(total[0], first + i, get); });
  for (int k = 0; k < kSums; ++k) {
    for (int j = 1; j < kSets; ++j) total[0][k] += total[j][k];
    out[k] = sum(total[0][k]);
  }
}

// e^x to about 1 ulp: x = n ln2 + r with |r| <= ln2/2, a degree-6 polynomial for e^r (Taylor with the error
// spread; Estrin's order, since it is its latency that one waits for) times 2^n. Below -86.98 it is 0 (no denormals),
// above 88.72 infinity; a NaN stays one.
FINETUNE_INLINE vf vexp(vf x) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa. With 126 more those bits, moved into
  // the exponent, are 2^(n-1): zero for n = -126, and its product with 2 e^r overflows where e^x does.
  const vf shift = set1(12582912.0f + 126.0f);
  x = vmin(set1(89.0f), vmax(set1(-87.3f), x));
  const vf shifted = x * 1.44269504f + shift;
  const vf n = shifted - shift;
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f, rr = r * r;
  const vf low = r * 1.6666665459e-1f + 5.0000001201e-1f;
  const vf middle = r * 8.3334519073e-3f + 4.1665795894e-2f;
  const vf high = r * 1.9875691500e-4f + 1.3981999507e-3f;
  const vf above_one = ((high * rr + middle) * rr + low) * rr + r;
  return (above_one * 2.0f + 2.0f) * (vf)((vi)shifted << 23);
}

}  // namespace finetune::FINETUNE_LEVEL
