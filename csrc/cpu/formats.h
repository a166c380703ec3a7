// Vectors of float16, e4m3 and e5m2 as vectors of floats, rounding to any format, and Philox for vectors.
#pragma once

#include "eight_bit.h"
#include "finetune/cast.h"
#include "finetune/philox.h"

namespace finetune::FINETUNE_LEVEL {

struct f16 {
  uint16_t bits;
};
struct e5m2 {  // the upper byte of a float16
  uint8_t bits;
};

FINETUNE_INLINE vf widen_f16(vh bits) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)bits);
#else
  const vu wide = __builtin_convertvector(bits, vu), size = wide & 0x7fffu, sign = (wide & 0x8000u) << 16;
  const vf normal = (vf)((size << 13) + (112u << 23)), small = (vf)((size << 13) + (113u << 23)) - 0x1p-14f;
  vf x = select((vi)(size < 0x400u), small, normal);
  x = select((vi)(size >= 0x7c00u), (vf)((size << 13) | 0x7f800000u), x);
  return (vf)((vu)x | sign);
#endif
}
FINETUNE_INLINE vf load(const f16* p) {
  vh bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen_f16(bits);
}
FINETUNE_INLINE vf load(const e5m2* p) {
  vub bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return widen_f16(__builtin_convertvector(bytes, vh) << 8);
}

template <class T>
constexpr Format kFormat = Format::f32;
template <>
constexpr Format kFormat<bf16> = Format::bf16;
template <>
constexpr Format kFormat<f16> = Format::f16;
template <>
constexpr Format kFormat<fp8> = Format::e4m3;
template <>
constexpr Format kFormat<e5m2> = Format::e5m2;

FINETUNE_INLINE vu pick(vi mask, vu yes, vu no) { return (yes & (vu)mask) | (no & ~(vu)mask); }

// The magnitude's bits in format L, before the check for what is too large: to nearest, ties to even.
template <class L>
FINETUNE_INLINE vu round_nearest(vu size) {
  constexpr uint32_t half = (1u << (L::drop - 1)) - 1;
  const vu normal = ((size + half + ((size >> L::drop) & 1u)) >> L::drop) - (uint32_t(127 - L::bias) << L::mantissa);
  if (L::bias == 127) return normal;
  // Below the smallest normal number: the sum's low bits count units of the smallest subnormal one.
  const float units = __builtin_ldexpf(1.0f, L::bias - 1 + L::mantissa), least = __builtin_ldexpf(1.0f, 1 - L::bias);
  const vu small = (vu)((vf)size * units + 12582912.0f) - 0x4b400000u;
  return pick((vi)((vf)size < least), small, normal);
}

// The same, up where `random` / 2^32 is less than what truncation would lose, in units of the last place.
template <class L>
FINETUNE_INLINE vu round_stochastic(vu size, vu random) {
  const vi field = (vi)(size >> 23), normal_number = field != 0;
  const vi exponent = (vi)pick(normal_number, (vu)(field - 127), (vu)(vi{} - 126));
  const vi is_normal = exponent >= 1 - L::bias;
  const vu mantissa = (size & 0x7fffffu) | ((vu)normal_number & 0x800000u);
  const vu value = pick(is_normal, size - (uint32_t(127 - L::bias) << 23), mantissa);
  const vu drop = pick(is_normal, vu{} + uint32_t(L::drop), (vu)(L::drop + 1 - L::bias - exponent));
  const vu few = pick((vi)(drop < 31u), drop, vu{} + 31u), more = drop - 32u;
  const vi fits = (vi)(drop < 32u);
  const vu kept = pick(fits, value >> few, vu{});
  const vu lost = pick(fits, value << (32u - few), value >> pick((vi)(more < 31u), more, vu{} + 31u));
  return kept - (vu)(random < lost);
}

template <class T, bool kStochastic>
FINETUNE_INLINE void store_rounded(T* p, vf x, vu random, uint32_t over);

// To nearest, ties to even, infinity for what is too large.
FINETUNE_INLINE void store(f16* p, vf x) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
#elif defined(__AVX2__)
  const __m128i half = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
#else
  store_rounded<f16, false>(p, x, vu{}, LayoutOf<Format::f16>::beyond);
#endif
}

// x rounded to T, stored. `over`: the bits of what is too large.
template <class T, bool kStochastic>
FINETUNE_INLINE void store_rounded(T* p, vf x, vu random, uint32_t over) {
  if constexpr (kFormat<T> == Format::f32) {
    const vu size = (vu)x & 0x7fffffffu;
    store(p, (vf)pick((vi)(size == 0x7f800000u), ((vu)x & 0x80000000u) | over, (vu)x));
#if defined(__AVX2__)
  } else if constexpr (kFormat<T> == Format::f16 && !kStochastic) {  // the hardware's
    if (over == LayoutOf<Format::f16>::beyond) return store(p, x);
    const vu size = (vu)x & 0x7fffffffu;
    const vf quiet = (vf)pick((vi)size > 0x7f800000, ((vu)x & 0x80000000u) | 0x7fc00000u, (vu)x);
#if defined(__AVX512F__)
    vh half = (vh)_mm512_maskz_cvtps_ph(0xffff, (__m512)quiet, _MM_FROUND_TO_NEAREST_INT);
#else
    vh half = (vh)_mm256_cvtps_ph((__m256)quiet, _MM_FROUND_TO_NEAREST_INT);
#endif
    const uint16_t infinity = LayoutOf<Format::f16>::beyond;
    half -= (vh)((half & 0x7fff) == infinity) & static_cast<uint16_t>(infinity - over);
    std::memcpy(p, &half, sizeof half);
#endif
  } else {
    using L = LayoutOf<kFormat<T>>;
    const vu bits = (vu)x, size = bits & 0x7fffffffu;
    vu out = kStochastic ? round_stochastic<L>(size, random) : round_nearest<L>(size);
    out = pick((vi)((vi)out > (vi)(vu{} + L::largest)), vu{} + over, out);
    out = pick((vi)((vi)size >= 0x7f800000), pick((vi)((vi)size > 0x7f800000), vu{} + L::nan, vu{} + over), out);
    out |= (bits >> 31) * L::sign;
    if constexpr (sizeof(T) == 2) {
      const vh narrow = __builtin_convertvector(out, vh);
      std::memcpy(p, &narrow, sizeof narrow);
    } else {
      const vub narrow = __builtin_convertvector(out, vub);
      std::memcpy(p, &narrow, sizeof narrow);
    }
  }
}
// The products of the lanes with b: even lanes and odd lanes apart.
FINETUNE_INLINE void multiply(vu a, uint32_t b, vu& high, vu& low) {
#if defined(__AVX512F__)
  const __m512i by = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_maskz_mul_epu32(0xff, (__m512i)a, by);
  const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, (__m512i)a, 32), by);
  high = (vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_maskz_srli_epi64(0xff, even, 32), odd);
  low = (vu)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_maskz_slli_epi64(0xff, odd, 32));
#elif defined(__AVX2__)
  const __m256i by = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32((__m256i)a, by), odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), by);
  high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t{a[i]} * b;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

FINETUNE_INLINE void zip(vu a, vu b, vu& first, vu& second) {  // a0 b0 a1 b1 …
#if defined(__clang__)                                         // which has no shuffle by a vector
  for (int i = 0; i < kLanes; ++i) {
    first[i] = i % 2 ? b[i / 2] : a[i / 2];
    second[i] = i % 2 ? b[(i + kLanes) / 2] : a[(i + kLanes) / 2];
  }
#else
  vi low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  first = __builtin_shuffle(a, b, low);
  second = __builtin_shuffle(a, b, high);
#endif
}

// The words of the elements first … first + 4 kLanes − 1; `first` is a multiple of 4.
FINETUNE_INLINE void random_words(int64_t first, uint64_t seed, vu (&out)[4]) {
  vu lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint32_t>(i);
  const uint64_t group = static_cast<uint64_t>(first) / 4;
  const vu low = static_cast<uint32_t>(group) + lanes;
  vu words[4] = {low, static_cast<uint32_t>(group >> 32) - (vu)(low < lanes), vu{}, vu{}};
  philox(words, seed, [](vu a, uint32_t b, vu& upper, vu& lower) { multiply(a, b, upper, lower); });
  vu even[2], odd[2];
  zip(words[0], words[2], even[0], even[1]);
  zip(words[1], words[3], odd[0], odd[1]);
  zip(even[0], odd[0], out[0], out[1]);
  zip(even[1], odd[1], out[2], out[3]);
}

}  // namespace finetune::FINETUNE_LEVEL
