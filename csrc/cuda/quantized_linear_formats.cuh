// The formats of quantized_linear's weights in registers: codes as fragments of mma and as floats, scales, and what turns
// sums into results. The layout and the arithmetic are explained in quantized_linear.cu.
#pragma once

#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/vector.cuh"
#include "finetune/quantized_linear_cuda.h"

namespace finetune {
namespace {

using Args = QuantizedLinearCuda;
constexpr int kClasses = 4;
constexpr int kPanel = 32, kTile = 32, kChunk = 512;  // rows, terms, bytes of 32 lanes

// --- formats: a lane's words of a tile, and its elements of (mma i, step) by register r and half e: row g + 8 (2 i +
// r % 2), term 16 step + 8 (r / 2) + 2 t + e

// Pairs of 1, and of the number whose mantissa's last bit counts 1.
template <class T>
constexpr unsigned kOnes = std::is_same_v<T, bf16> ? 0x3f803f80u : 0x3c003c00u;
template <class T>
constexpr unsigned kMagic = std::is_same_v<T, bf16> ? 0x43004300u : 0x64006400u;
template <class T>
constexpr float kOffset = std::is_same_v<T, bf16> ? 128.0f : 1024.0f;

struct Fp32 {
  static constexpr int kChunks = 8, kFold = 0;
  static constexpr bool kScaled = false, kMinimum = false;
  __device__ static float value(const unsigned (&words)[32], const float*, int i, int step, int r, int e) {
    return __uint_as_float(words[4 * (4 * i + 2 * step + r / 2) + 2 * (r % 2) + e]);
  }
};

struct Bf16 {
  static constexpr int kChunks = 4, kFold = 0;
  static constexpr bool kScaled = false, kMinimum = false;
  template <class T>
  __device__ static void fragment(unsigned (&a)[4], const unsigned (&words)[16], int i, int step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = words[4 * (2 * i + step) + r];
  }
  __device__ static float value(const unsigned (&words)[16], const float*, int i, int step, int r, int e) {
    const unsigned word = words[4 * (2 * i + step) + r];
    return __uint_as_float(e ? word & 0xffff0000u : word << 16);
  }
};

template <int kTerms>  // of a group; 0: all of a row
struct Int8 {
  static constexpr int kChunks = 2, kFold = kTerms, kGroup = kTerms;
  static constexpr bool kScaled = true, kMinimum = false;
  template <class T>
  __device__ static void fragment(unsigned (&a)[4], const unsigned (&words)[8], int i, int step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const unsigned word = words[4 * i + 2 * step + r / 2] >> (8 * (r % 2));
      a[r] = ptx::subtract<T>(ptx::mask_or(word, 0x007f007fu, kMagic<T>), ptx::mask_or(word, 0x00800080u, kMagic<T>));
    }
  }
  __device__ static float value(const unsigned (&words)[8], const float*, int i, int step, int r, int e) {
    const unsigned word = words[4 * i + 2 * step + r / 2] >> (8 * (r % 2) + 16 * e);
    return static_cast<float>(static_cast<int8_t>(word & 0xffu));
  }
};

struct Int4 {
  static constexpr int kChunks = 1, kFold = 32, kGroup = 32;
  static constexpr bool kScaled = true, kMinimum = true;
  template <class T>
  __device__ static void fragment(unsigned (&a)[4], const unsigned (&words)[4], int i, int step) {
    const unsigned word = words[2 * i + step];
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = ptx::mask_or(word >> (4 * r), 0x000f000fu, kMagic<T>);
  }
  __device__ static float value(const unsigned (&words)[4], const float*, int i, int step, int r, int e) {
    return static_cast<float>((words[2 * i + step] >> (4 * r + 16 * e)) & 15u);
  }
};

// The quantiles of finetune/ops/quantized_linear.py.
__host__ __device__ constexpr float nf4(int code) {
  constexpr float values[16] = {-1.0f,
                                -0.6961928009986877f,
                                -0.5250730514526367f,
                                -0.39491748809814453f,
                                -0.28444138169288635f,
                                -0.18477343022823334f,
                                -0.09105003625154495f,
                                0.0f,
                                0.07958029955625534f,
                                0.16093020141124725f,
                                0.24611230194568634f,
                                0.33791524171829224f,
                                0.44070982933044434f,
                                0.5626170039176941f,
                                0.7229568362236023f,
                                1.0f};
  return values[code];
}
// The byte `which` of the codes first … first + 3 in T, as a word. None of the values is subnormal in fp16.
template <class T>
__host__ __device__ constexpr unsigned nf4_bytes(int first, int which) {
  unsigned word = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned bits = __builtin_bit_cast(unsigned, nf4(first + i)), size = bits & 0x7fffffffu;
    unsigned narrow = size >> 16;
    if (std::is_same_v<T, bf16>) narrow = (size + 0x7fffu + ((size >> 16) & 1u)) >> 16;
    if (!std::is_same_v<T, bf16>) narrow = size ? (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13 : 0;
    word |= (((narrow | (bits >> 31 << 15)) >> (8 * which)) & 0xffu) << (8 * i);
  }
  return word;
}

struct Nf4 {
  static constexpr int kChunks = 1, kFold = 32, kGroup = 64;  // half a group at a time
  static constexpr bool kScaled = true, kMinimum = false;
  // The byte `which` of the values of four codes, the low halves of `codes`.
  template <class T, int which>
  __device__ static unsigned bytes(unsigned codes) {
    constexpr unsigned t0 = nf4_bytes<T>(0, which), t1 = nf4_bytes<T>(4, which), t2 = nf4_bytes<T>(8, which),
                       t3 = nf4_bytes<T>(12, which);
    const unsigned within = codes & 0x7777u, upper = ptx::mask_or(codes >> 1, 0x4444u, 0x3210u);
    return ptx::permute_bytes(ptx::permute_bytes(t0, t1, within), ptx::permute_bytes(t2, t3, within), upper);
  }
  template <class T>
  __device__ static void fragment(unsigned (&a)[4], const unsigned (&words)[4], int i, int step) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const unsigned codes = words[2 * i + step] >> (16 * pair);
      const unsigned low = bytes<T, 0>(codes), high = bytes<T, 1>(codes);
      a[2 * pair] = ptx::permute_bytes(low, high, 0x5140u);
      a[2 * pair + 1] = ptx::permute_bytes(low, high, 0x7362u);
    }
  }
  __device__ static float value(const unsigned (&words)[4], const float* table, int i, int step, int r, int e) {
    return table[(words[2 * i + step] >> (8 * r + 4 * e)) & 15u];
  }
};

// --- scales

// A group's bytes for a panel.
__device__ __forceinline__ int group_bytes(const Args& a) {
  return kPanel * (a.minima ? 2 : 1) * (a.half_scales ? 2 : 4);
}
// Where those of the panel's tile begin, of one group or, of 16 terms, of two.
template <class F>
__device__ __forceinline__ int64_t scale_offset(const Args& a, int64_t panel, int64_t tile) {
  const int64_t groups = ceil_div(a.tiles * kTile, F::kGroup);
  return (panel * groups + tile * kTile / F::kGroup) * group_bytes(a);
}

struct Scales {  // of a lane's four rows in one group
  float scale[4], minimum[4];
};
template <bool kMinimum>
__device__ __forceinline__ Scales load_scales(const Args& a, const unsigned char* group, int g) {
  Scales s;
  if (kMinimum && a.minima && a.half_scales) {
    const auto v = load<f16, 8>(reinterpret_cast<const f16*>(group) + 8 * g);
#pragma unroll
    for (int j = 0; j < 4; ++j) s.scale[j] = to_float(v.at[2 * j]), s.minimum[j] = to_float(v.at[2 * j + 1]);
    return s;
  }
  if (kMinimum && a.minima) {
    const float* const pairs = reinterpret_cast<const float*>(group) + 8 * g;
    const auto v = load<float, 4>(pairs), w = load<float, 4>(pairs + 4);
    s.scale[0] = v.at[0], s.scale[1] = v.at[2], s.scale[2] = w.at[0], s.scale[3] = w.at[2];
    s.minimum[0] = v.at[1], s.minimum[1] = v.at[3], s.minimum[2] = w.at[1], s.minimum[3] = w.at[3];
    return s;
  }
  if (a.half_scales) {
    const auto v = load<f16, 4>(reinterpret_cast<const f16*>(group) + 4 * g);
#pragma unroll
    for (int j = 0; j < 4; ++j) s.scale[j] = to_float(v.at[j]);
  } else {
    const auto v = load<float, 4>(reinterpret_cast<const float*>(group) + 4 * g);
#pragma unroll
    for (int j = 0; j < 4; ++j) s.scale[j] = v.at[j];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) s.minimum[j] = -8 * s.scale[j];  // int4 without minima
  return s;
}

// The scales and biases of N rows from one on: what turns sums into results.
template <class F, class T, int N>
struct Ends {
  float scale[N], bias[N];
  __device__ __forceinline__ Ends(const Args& a, int64_t row) {
    if constexpr (F::kFold == 0 && F::kScaled) {
      if (a.half_scales) {
        const auto v = load<f16, N>(static_cast<const f16*>(a.scale) + row);
#pragma unroll
        for (int j = 0; j < N; ++j) scale[j] = to_float(v.at[j]);
      } else {
        const auto v = load<float, N>(static_cast<const float*>(a.scale) + row);
#pragma unroll
        for (int j = 0; j < N; ++j) scale[j] = v.at[j];
      }
    }
    const T* const from = static_cast<const T*>(a.bias) + (a.bias ? row : 0);
    if (a.bias && are_aligned(static_cast<const T*>(a.bias)) && row + N <= a.rows) {
      const auto v = load<T, N>(from);
#pragma unroll
      for (int j = 0; j < N; ++j) bias[j] = to_float(v.at[j]);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) bias[j] = a.bias && row + j < a.rows ? to_float(from[j]) : 0.0f;
    }
  }
  __device__ __forceinline__ T finish(int j, float sum) const {
    if (F::kFold == 0 && F::kScaled) sum *= scale[j];
    return from_float<T>(sum + bias[j]);
  }
};

}  // namespace
}  // namespace finetune
