// Products of activations with packed weights (finetune/packed.h): y[r] = W x[r] for rows r of x, 16 rows of W (a panel)
// in the lanes, elements of x broadcast, so that no sum is horizontal. For one row of x a panel is read once, for more
// it comes from the first cache again.
//
//     Prepared x = prepared(weight, m, exact, workspace);   // workspace: prepared_bytes(m, depth)
//     prepare(weight, activations, stride, first, last, x); // rows [first, last): on any threads
//     product(weight, x, m, first_panel, last_panel, emit); // emit(panel, row of x, const float* y): 16 results
//
// Two weights share a Prepared if they have the same depth, format and group. With `exact` fp32 activations are used as
// they are; otherwise they may become bf16 or 16-bit integers (finetune/packed.h).
//
// The bits of a result depend on its row of x and the weight alone: every accumulator belongs to one (row of W, row of
// x) and goes over K in order, however many rows are computed at once.
#pragma once

// As in gemm.h: the portable level's 16 lanes would live on the stack.
#if FINETUNE_LANES == 16 && !defined(__AVX512F__) && !defined(FINETUNE_WIDE)
#ifdef FINETUNE_INLINE
#error "include packed_product.h before simd.h"
#endif
#undef FINETUNE_LANES
#define FINETUNE_LANES 4
#endif

#include <utility>

#include "finetune/packed.h"
#include "row_blocks.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int kParts = kPanel / kLanes;                           // vectors of a panel's 16 rows
constexpr int kRowTile = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;  // rows of x at once: their sums fill the registers

struct Lanes {  // a number for each row of a panel
  vf part[kParts];
};

FINETUNE_INLINE vu load_words(const uint32_t* p) {
  vu out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

FINETUNE_INLINE float half_to_float(uint16_t half) {
  const uint32_t size = half & 0x7fffu, sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  // Exponent and mantissa move to the top and the bias grows by 112; a subnormal is m · 2^-24.
  uint32_t bits = size >= 0x7c00u ? (size << 13) + (224u << 23) : (size << 13) + (112u << 23);
  float out = static_cast<float>(size) * 0x1p-24f;
  if (size >= 0x400u) std::memcpy(&out, &bits, sizeof out);
  std::memcpy(&bits, &out, sizeof out);
  bits |= sign;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

FINETUNE_INLINE vf load_half(const uint16_t* p) {
#if defined(__AVX512F__)  // the masked forms: gcc warns of the others' undefined operand
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf out;
  for (int i = 0; i < kLanes; ++i) out[i] = half_to_float(p[i]);
  return out;
#endif
}

// Scales or minima of a panel's group.
FINETUNE_INLINE Lanes of_group(const void* values, bool half, int64_t index) {
  Lanes out;
  for (int v = 0; v < kParts; ++v) {
    const int64_t at = index * kPanel + v * kLanes;
    out.part[v] =
        half ? load_half(static_cast<const uint16_t*>(values) + at) : load(static_cast<const float*>(values) + at);
  }
  return out;
}

alignas(64) constexpr float kNf4[16] = {-1.0f,
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

FINETUNE_INLINE vf nf4_of(vu index) {  // the low 4 bits count
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, _mm512_load_ps(kNf4));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(kNf4), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(kNf4 + 8), (__m256i)index);
  return (vf)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
  vf out;
  for (int i = 0; i < kLanes; ++i) out[i] = kNf4[index[i] & 15];
  return out;
#endif
}

// Part v of the weights of 8 elements along depth, from element 8 · i of the panel: `body(t, vf)` for t = 0 … 7.
template <WeightFormat kFormat, class Body>
FINETUNE_INLINE void eight(const uint32_t* panel, int64_t i, int v, const Lanes& scale, const Lanes& minimum,
                           Body&& body) {
  constexpr int kWords = kFormat == WeightFormat::fp32   ? 8
                         : kFormat == WeightFormat::bf16 ? 4
                         : kFormat == WeightFormat::int8 ? 2
                                                         : 1;
  const uint32_t* at = panel + i * kWords * kPanel + v * kLanes;
  const vf s = scale.part[v];
  if constexpr (kFormat == WeightFormat::fp32) {
    for (int t = 0; t < 8; ++t) body(t, load(reinterpret_cast<const float*>(at + t * kPanel)));
  } else if constexpr (kFormat == WeightFormat::bf16) {
    for (int t = 0; t < 4; ++t) {
      const vu pair = load_words(at + t * kPanel);
      body(2 * t, (vf)(pair << 16));
      body(2 * t + 1, (vf)(pair & 0xffff0000u));
    }
  } else if constexpr (kFormat == WeightFormat::int8) {
    for (int w = 0; w < 2; ++w) {
      const vi word = (vi)(load_words(at + w * kPanel) ^ 0x80808080u);
      for (int t = 0; t < 4; ++t)
        body(4 * w + t, s * __builtin_convertvector((vi)((vu)word << (24 - 8 * t)) >> 24, vf));
    }
  } else {
    const vu word = load_words(at);
    const auto one = [&](int t, vu code) {
      if constexpr (kFormat == WeightFormat::nf4) {
        body(t, s * nf4_of(code));
      } else {
        body(t, __builtin_convertvector((vi)(code & 15u), vf) * s + minimum.part[v]);
      }
    };
    for (int t = 0; t < 4; ++t) one(t, word >> (8 * t));
    for (int t = 0; t < 4; ++t) one(4 + t, word >> (8 * t + 4));
  }
}

// y of kRows rows of x, fp32 all through: sums of 64 elements, and the sum of those.
template <WeightFormat kFormat, int kRows, class Emit>
FINETUNE_INLINE void tile_f32(const PackedWeight& w, const Prepared& x, int64_t panel, int64_t row, Emit&& emit) {
  constexpr bool kScales = kFormat != WeightFormat::fp32 && kFormat != WeightFormat::bf16;
  const auto* codes = static_cast<const uint32_t*>(w.codes) + panel * w.words() * kPanel;
  const float* from[kRows];
  for (int r = 0; r < kRows; ++r) from[r] = reinterpret_cast<const float*>(x.data + (row + r) * x.row);
  vf sum[kRows][kParts] = {};
  const int64_t size = w.group ? w.group : kDepthStep, first_group = panel * w.groups();
  Lanes scale{}, minimum{};
  if constexpr (kScales) {
    if (!w.group) scale = of_group(w.scale, w.half_scales, first_group);
  }
  for (int64_t k = 0; k < w.padded(); k += kDepthStep) {
    vf part[kRows][kParts] = {};
    for (int64_t at = k; at < k + kDepthStep; at += size) {
      if constexpr (kScales) {
        if (w.group) scale = of_group(w.scale, w.half_scales, first_group + at / size);
      }
      if constexpr (kFormat == WeightFormat::int4) {
        if (w.minimum) {
          minimum = of_group(w.minimum, w.half_scales, first_group + at / size);
        } else {
          for (int v = 0; v < kParts; ++v) minimum.part[v] = scale.part[v] * -8.0f;
        }
      }
      for (int64_t i = at / 8; i < (at + size) / 8; ++i) {
        for (int v = 0; v < kParts; ++v) {
          eight<kFormat>(codes, i, v, scale, minimum, [&](int t, vf weights) {
            for (int r = 0; r < kRows; ++r) part[r][v] += weights * from[r][8 * i + t];
          });
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kParts; ++v) sum[r][v] += part[r][v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    alignas(64) float y[kPanel];
    for (int v = 0; v < kParts; ++v) store(y + v * kLanes, sum[r][v]);
    emit(panel, row + r, static_cast<const float*>(y));
  }
}

template <class F>
FINETUNE_INLINE void for_format(WeightFormat format, F&& f) {
  switch (format) {
    case WeightFormat::fp32:
      return f.template operator()<WeightFormat::fp32>();
    case WeightFormat::bf16:
      return f.template operator()<WeightFormat::bf16>();
    case WeightFormat::int8:
      return f.template operator()<WeightFormat::int8>();
    case WeightFormat::int4:
      return f.template operator()<WeightFormat::int4>();
    case WeightFormat::nf4:
      return f.template operator()<WeightFormat::nf4>();
  }
}

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#include "packed_vnni.h"
#define FINETUNE_DOTS 1
#if defined(__AMX_BF16__) || defined(FINETUNE_EMULATED_TILES)
#include "packed_tiles.h"
#define FINETUNE_TILES 1
#endif
#endif

namespace finetune::FINETUNE_LEVEL {
namespace {

// Where m rows of x will be prepared for a weight.
inline Prepared prepared(const PackedWeight& w, [[maybe_unused]] int64_t m, [[maybe_unused]] bool exact,
                         void* workspace) {
  char* const data = static_cast<char*>(workspace);
#if defined(FINETUNE_DOTS)
  if (!exact && (w.format == WeightFormat::int8 || (kIntegers4 && w.format == WeightFormat::int4)))
    return {Activations::i16, data, Blocks(w).row()};
  if (!exact && w.format != WeightFormat::fp32) return {Activations::bf16, data, bf16_row(w)};
#endif
  return {Activations::f32, data, w.padded() * 4};
}

// Rows [first, last) of x (m, depth) in fp32 or bf16, `stride` elements from row to row.
template <class T>
void prepare(const PackedWeight& w, const T* x, int64_t stride, int64_t first, int64_t last, const Prepared& to) {
  for (int64_t r = first; r < last; ++r) {
    const T* from = x + r * stride;
    char* const row = to.data + r * to.row;
#if defined(FINETUNE_DOTS)
    if (to.kind == Activations::bf16) {
      prepare_bf16(w, from, row);
      continue;
    }
    if (to.kind == Activations::i16) {
      prepare_integers(w, from, row);
      continue;
    }
#endif
    auto* const floats = reinterpret_cast<float*>(row);
    for_each_vector(w.depth, [&](int64_t i, auto get, auto put) { put(floats + i, get(from + i)); });
    std::memset(floats + w.depth, 0, (w.padded() - w.depth) * sizeof(float));
  }
}

// emit(panel, row, y): the 16 results of rows 16 · panel … of W (those behind the last are 0) for each row of x.
template <class Emit>
void product(const PackedWeight& w, const Prepared& x, int64_t m, int64_t first_panel, int64_t last_panel,
             Emit&& emit) {
#if defined(FINETUNE_TILES)
  if (x.kind == Activations::bf16 && w.format == WeightFormat::bf16) {
    return product_bf16_tiles(w, x, m, first_panel, last_panel, emit);
  }
  if (x.kind == Activations::i16 && m > 4) return product_integer_tiles(w, x, m, first_panel, last_panel, emit);
#endif
#if defined(FINETUNE_DOTS)
  if (x.kind == Activations::bf16) return product_bf16(w, x, m, first_panel, last_panel, emit);
  if (x.kind == Activations::i16) return product_integers(w, x, m, first_panel, last_panel, emit);
#endif
  for_format(w.format, [&]<WeightFormat kFormat>() {
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      in_tiles<kRowTile>(m, [&]<int kRows>(int64_t row) { tile_f32<kFormat, kRows>(w, x, panel, row, emit); });
    }
  });
}

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
