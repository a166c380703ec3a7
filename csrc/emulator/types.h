// The 16- and 8-bit floating types of CUDA on the host: storage, and conversions that round to nearest, ties to even.
// The names are those of cuda_bf16.h, cuda_fp16.h and cuda_fp8.h, as far as the kernels use them.
#pragma once

#include <bit>
#include <cstdint>

namespace emulator {

// A binary float of E exponent and M mantissa bits, from fp32, round to nearest even. kFinite: no infinities, only the
// all-ones pattern is NaN (e4m3fn). kSaturate: what is too large becomes the largest finite value (NaN stays NaN).
template <int E, int M, bool kFinite, bool kSaturate>
constexpr uint32_t narrow(float value) {
  constexpr int bias = (1 << (E - 1)) - 1;
  constexpr uint32_t largest = ((1u << (E + M)) - 1) - (kFinite ? 1 : (1u << M)),
                     beyond = largest + 1;  // infinity, or NaN
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = (bits >> 31) << (E + M), size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return (1u << (E + M)) - 1;  // every NaN becomes this one, as on the device
  const int exponent = static_cast<int>(size >> 23) - 127;
  uint32_t result;
  if (exponent >= 1 - bias) {  // normal: drop 23 − M bits, a carry moves into the exponent as it should
    const uint64_t wide = size - (static_cast<uint64_t>(127 - bias) << 23);
    constexpr int drop = 23 - M;
    result = static_cast<uint32_t>((wide + ((1u << (drop - 1)) - 1) + ((wide >> drop) & 1)) >> drop);
  } else {  // subnormal: the value in units of 2^(1 − bias − M)
    const int drop = 23 - M + (1 - bias - exponent);
    const uint64_t mantissa = (size & 0x7fffffu) | (size >> 23 ? 0x800000u : 0u);
    if (drop > 40 || exponent < -126) {
      result = 0;
    } else {
      result = static_cast<uint32_t>((mantissa + ((uint64_t{1} << (drop - 1)) - 1) + ((mantissa >> drop) & 1)) >> drop);
    }
  }
  if (result > largest) result = kSaturate ? largest : beyond;
  return sign | result;
}

template <int E, int M, bool kFinite>
constexpr float widen(uint32_t bits) {
  constexpr int bias = (1 << (E - 1)) - 1;
  constexpr uint32_t ones = (1u << E) - 1, nan = 0x7fc00000u;
  const uint32_t sign = (bits >> (E + M)) << 31, exponent = (bits >> M) & ones, mantissa = bits & ((1u << M) - 1);
  if (kFinite ? (bits & ((1u << (E + M)) - 1)) == (1u << (E + M)) - 1 : exponent == ones && mantissa) {
    return std::bit_cast<float>(sign | nan);
  }
  if (!kFinite && exponent == ones) return std::bit_cast<float>(sign | 0x7f800000u);
  if (exponent) return std::bit_cast<float>(sign | ((exponent + 127 - bias) << 23) | (mantissa << (23 - M)));
  float unit = 1.0f;
  for (int i = 0; i < bias - 1 + M; ++i) unit *= 0.5f;  // bf16's smallest is an fp32 subnormal, and exact
  const float value = static_cast<float>(mantissa) * unit;
  return sign ? -value : value;
}

}  // namespace emulator

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct __nv_fp8_e4m3 {
  uint8_t __x;
  explicit operator float() const { return emulator::widen<4, 3, true>(__x); }
};
struct __nv_fp8_e5m2 {
  uint8_t __x;
  explicit operator float() const { return emulator::widen<5, 2, false>(__x); }
};
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
static_assert(sizeof(__nv_bfloat162) == 4 && sizeof(__half2) == 4);

inline float __bfloat162float(__nv_bfloat16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half v) { return emulator::widen<5, 10, false>(v.bits); }
inline __half __float2half(float v) { return {static_cast<uint16_t>(emulator::narrow<5, 10, false, false>(v))}; }
inline uint8_t __nv_cvt_float_to_fp8(float v, __nv_saturation_t saturate, __nv_fp8_interpretation_t kind) {
  const bool finite = saturate == __NV_SATFINITE;
  if (kind == __NV_E4M3) {
    return static_cast<uint8_t>(finite ? emulator::narrow<4, 3, true, true>(v)
                                       : emulator::narrow<4, 3, true, false>(v));
  }
  return static_cast<uint8_t>(finite ? emulator::narrow<5, 2, false, true>(v)
                                     : emulator::narrow<5, 2, false, false>(v));
}
