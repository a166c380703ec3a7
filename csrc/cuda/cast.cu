// Conversion between fp32, bf16, f16 and the 8-bit e4m3 and e5m2, to nearest or stochastically. The rounding is integer
// arithmetic on fp32's bits, the same for every format and GPU, so that the bits are those of the CPU's.
//
// Memory: a thread takes four adjacent elements, which share one Philox draw; reads x and writes y once: 5 bytes an
// element from fp32 to 8 bits. About 15 operations an element, or 45 with the random numbers: 3 to 9 a byte, under the
// roof of memory bandwidth.
#include "finetune/cast.h"

#include "device/launch.cuh"
#include "device/vector.cuh"
#include "finetune/philox.h"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 256, kEach = 4;

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

template <int kBytes>
struct Bits;
template <>
struct Bits<1> {
  using type = uint8_t;
};
template <>
struct Bits<2> {
  using type = uint16_t;
};
template <>
struct Bits<4> {
  using type = uint32_t;
};

// x rounded to format L; stochastically: up where random / 2^32 is less than what truncation would lose.
template <class L>
__device__ __forceinline__ uint32_t round_to(float x, bool stochastic, uint32_t random, bool saturate) {
  const uint32_t bits = __float_as_uint(x), sign = (bits >> 31) * L::sign, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return sign | L::nan;
  const uint32_t over = saturate ? L::largest : L::beyond;
  if (size >= 0x7f800000u) return sign | over;
  const int field = static_cast<int>(size >> 23), exponent = field ? field - 127 : -126;
  uint32_t value = size - (static_cast<uint32_t>(127 - L::bias) << 23), drop = L::drop;
  if (exponent < 1 - L::bias) {  // the result is subnormal: the value in units of its last place, after `drop` bits
    value = (size & 0x7fffffu) | (field ? 0x800000u : 0u);
    drop = L::drop + 1 - L::bias - exponent;
  }
  uint32_t out;
  if (stochastic) {
    const uint32_t lost = drop < 32 ? value << (32 - drop) : drop < 64 ? value >> (drop - 32) : 0;
    out = (drop < 32 ? value >> drop : 0) + (random < lost ? 1 : 0);
  } else {
    const uint32_t odd = drop < 25 ? (value >> drop) & 1 : 1;
    out = drop < 25 ? (value + (1u << (drop - 1)) - 1 + odd) >> drop : 0;
  }
  return sign | (out > L::largest ? over : out);
}

template <class From, class To>
__global__ void __launch_bounds__(BLOCK_SIZE) convert(Cast a) {
  using Out = typename Bits<sizeof(To)>::type;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * BLOCK_SIZE + threadIdx.x) * kEach, left = a.size - at;
  if (left < 1) return;
  const From* x = static_cast<const From*>(a.x) + at;
  Out* y = static_cast<Out*>(a.y) + at;
  const float scale = a.scale * (a.scale_tensor ? *a.scale_tensor : 1.0f);
  const bool vectors = left >= kEach && are_aligned(static_cast<const From*>(a.x), static_cast<Out*>(a.y));
  Vector<From, kEach> given;
  if (vectors) given = load<From, kEach>(x);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (!vectors) given.at[j] = j < left ? x[j] : From{};
  }
  const auto group = static_cast<uint64_t>(at) / kEach;
  uint32_t words[4] = {static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0, 0};
  if (a.stochastic) philox(words, a.seed);
  Vector<Out, kEach> made;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const float value = to_float(given.at[j]) * scale;
    if constexpr (kFormat<To> == Format::f32) {
      const uint32_t bits = __float_as_uint(value);
      made.at[j] = a.saturate && (bits & 0x7fffffffu) == 0x7f800000u ? bits - 1 : bits;
    } else {
      made.at[j] = static_cast<Out>(round_to<LayoutOf<kFormat<To>>>(value, a.stochastic, words[j], a.saturate));
    }
  }
  if (vectors) {
    store(y, made);
  } else {
    for (int j = 0; j < kEach && j < left; ++j) y[j] = made.at[j];
  }
}

template <class F>
Status for_format(Format format, F&& f) {
  switch (format) {
    case Format::f32:
      return f(float{});
    case Format::bf16:
      return f(bf16{});
    case Format::f16:
      return f(f16{});
    case Format::e4m3:
      return f(fp8{});
    case Format::e5m2:
      return f(e5m2{});
  }
  return Status::unsupported;
}

}  // namespace

template <>
Status launch_cuda(const Cast& a, void* stream) {
  if (!a.size) return Status::ok;
  const int64_t blocks = ceil_div(a.size, BLOCK_SIZE * kEach);
  if (blocks > 0x7fffffff) return Status::unsupported;
  return for_format(a.from, [&](auto from) {
    return for_format(a.to, [&](auto to) {
      return launch(convert<decltype(from), decltype(to)>, dim3(static_cast<unsigned>(blocks)), dim3(BLOCK_SIZE), 0,
                    stream, a);
    });
  });
}

}  // namespace finetune
