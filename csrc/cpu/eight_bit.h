// Vectors of 8-bit elements: int8 and the floating-point e4m3 (OCP 8-bit Floating Point Specification 1.0: 4 exponent
// bits of bias 7, 3 of mantissa, no infinities, all ones is NaN).
#pragma once

#include "finetune/kv_cache.h"
#include "simd.h"

namespace finetune::FINETUNE_LEVEL {

struct i8 {
  int8_t bits;
};
struct fp8 {
  uint8_t bits;
};
typedef int8_t vb __attribute__((vector_size(kLanes)));
typedef uint8_t vub __attribute__((vector_size(kLanes)));

FINETUNE_INLINE vf load(const i8* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return __builtin_convertvector((vi)_mm512_maskz_cvtepi8_epi32(0xffff, bytes), vf);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vb bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
#endif
}

FINETUNE_INLINE vf load(const fp8* p) {
#if defined(__AVX512F__)
  const vu bits = (vu)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  const vu bits = (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  vub bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const vu bits = __builtin_convertvector(bytes, vu);
#endif
  // Exponent and mantissa move to the top and the bias grows by 120. A subnormal, m · 2^-9, is read with the exponent
  // of 2^-6 and its leading 1, and loses that.
  const vu size = bits & 0x7fu, sign = (bits & 0x80u) << 24;
  const vf normal = (vf)((size << 20) + (120u << 23)), small = (vf)((size << 20) + (121u << 23)) - 0x1p-6f;
  vf x = select((vi)(size < 8u), small, normal);
  x = select((vi)(size == 0x7fu), set1(__builtin_nanf("")), x);
  return (vf)((vu)x | sign);
}

// To nearest, ties to even; |x| must be within the type's range.
FINETUNE_INLINE void store(i8* p, vf x) {
  const vi whole = (vi)(x + 12582912.0f) - 0x4b400000;  // 1.5 · 2^23: the integer stands in the low bits
  const vb bytes = __builtin_convertvector(whole, vb);
  std::memcpy(p, &bytes, sizeof bytes);
}
FINETUNE_INLINE void store(fp8* p, vf x) {
  const vu bits = (vu)x, size = bits & 0x7fffffffu;
  const vu normal = ((size + 0x7ffffu + ((size >> 20) & 1u)) >> 20) - (120u << 3);
  const vu small = (vu)((vf)size * 512.0f + 12582912.0f) - 0x4b400000u;  // in units of 2^-9
  const vu magnitude = (vu)select((vi)((vf)size < 0x1p-6f), (vf)small, (vf)normal);
  const vub bytes = __builtin_convertvector(magnitude | ((bits >> 24) & 0x80u), vub);
  std::memcpy(p, &bytes, sizeof bytes);
}

template <class C>
constexpr float kLargest = std::is_same_v<C, i8> ? kLargestInt8 : kLargestFp8;

}  // namespace finetune::FINETUNE_LEVEL
