// The products of packed_product.h by AVX-512's dot products: vdpbf16ps (2 products of bf16 a lane) for bf16 and codes of
// 4 bits, vpdpbusd (4 of unsigned with signed bytes a lane) for int8. Included by packed_product.h.
//
// A code of 4 bits becomes its value in bf16 by a look-up (vpermw), for int4 exactly code − 8; the sum of a group is
// multiplied by its scale in fp32, and minimum + 8 · scale, which is near 0, by the sum of the group's elements of x.
//
// For int8, and int4 where there is AMX, a row of x becomes integers X = round(32639 x / largest) = 256 high + low, both
// signed bytes, so that
//
//     Σ_k code_k X_k = 256 Σ code · high + Σ code · low
//
// is exact in 32 bits over a block (a group, or 256 elements where a row has one scale: 256 · 32639 · 128 < 2^31; what
// wraps around on the way wraps back). Codes are unsigned in memory (+ 128 in int8, + 8 in int4 without minima): what
// that adds, 128 Σ X or 8 Σ X, is a number a block and row of x, and is subtracted. Blocks are added up in fp32, in order.
// The error is that of X, 2^-16 of the row's largest: one 128th of bf16's.
//
// Instructions for 16 rows of W and 64 products each: 2 vdpbf16ps or vpdpbusd, of which a core of Zen 5 begins 2 a cycle;
// in addition a block and row of x 1 or 2 for codes of 4 bits, 3 or 4 for integers, and a word of codes 7, for all rows.
#pragma once

#include <bit>

#include "largest.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr float kLargestX = 32639;  // 127 · 256 + 127
constexpr int64_t kLongBlock = 256;

struct Blocks {  // a prepared row of integers: scale, high bytes, low bytes, an offset or sum a block
  int64_t depth, block, count;
  explicit Blocks(const PackedWeight& w)
      : depth(w.padded()), block(w.group ? w.group : kLongBlock), count((depth + block - 1) / block) {}
  int64_t row() const { return 64 + 2 * depth + (count * 4 + 63) / 64 * 64; }
};
constexpr int64_t kHigh = 64;  // where the high bytes begin

#if defined(__AMX_BF16__) || defined(FINETUNE_EMULATED_TILES)
constexpr bool kIntegers4 = true;  // of int4: exact, so that few rows by vpdpbusd have the bits of many by tiles
#else
constexpr bool kIntegers4 = false;
#endif

FINETUNE_INLINE __m512i bytes4(const char* p) {  // 4 bytes to all lanes
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}

template <class T>
void prepare_integers(const PackedWeight& w, const T* x, char* to) {
  const Blocks blocks(w);
  const float largest = largest_magnitude(x, w.depth);
  float scale = largest / kLargestX, inverse = kLargestX / largest;
  if (!(largest >= 0x1p-100f)) scale = 0, inverse = 0;                       // nothing, to fp32
  if (!(largest <= 3.4028235e38f)) scale = __builtin_nanf(""), inverse = 0;  // a row of NaN
  std::memcpy(to, &scale, sizeof scale);
  auto* offsets = reinterpret_cast<int32_t*>(to + kHigh + 2 * blocks.depth);
  const bool minima = w.minimum != nullptr;
  const int32_t unit = w.format == WeightFormat::int8 ? -128 : -8;
  for (int64_t b = 0; b < blocks.count; ++b) {
    __m512i sum = _mm512_setzero_si512();
    const int64_t end = (b + 1) * blocks.block < blocks.depth ? (b + 1) * blocks.block : blocks.depth;
    for (int64_t k = b * blocks.block; k < end; k += 16) {
      const vf part = k + 16 <= w.depth ? load(x + k) : k < w.depth ? load_part(x + k, w.depth - k) : vf{};
      const vf product = inverse == 0 ? vf{} : part * inverse;
      const __m512i whole = _mm512_maskz_cvtps_epi32(0xffff, (__m512)product);
      sum = _mm512_add_epi32(sum, whole);
      const __m512i low = (__m512i)((vi)((vu)(vi)whole << 24) >> 24), high = (__m512i)(((vi)whole - (vi)low) >> 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kHigh + k), _mm512_maskz_cvtepi32_epi8(0xffff, high));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kHigh + blocks.depth + k),
                       _mm512_maskz_cvtepi32_epi8(0xffff, low));
    }
    int32_t total = 0;
    for (int i = 0; i < kLanes; ++i) total += ((vi)sum)[i];
    const float as_float = static_cast<float>(total);
    if (minima) {
      std::memcpy(offsets + b, &as_float, sizeof as_float);
    } else {
      offsets[b] = static_cast<int32_t>(static_cast<uint32_t>(total) * static_cast<uint32_t>(unit));
    }
  }
}

// A row in bf16. For codes of 4 bits in the order of code_pair; for int4, behind it, the sum of each group of 32.
inline int64_t bf16_row(const PackedWeight& w) {
  return w.padded() * 2 + (w.format == WeightFormat::int4 ? (w.groups() * 4 + 63) / 64 * 64 : 0);
}
template <class T>
void prepare_bf16(const PackedWeight& w, const T* x, char* to) {
  auto* row = reinterpret_cast<bf16*>(to);
  for_each_vector(w.depth, [&](int64_t i, auto get, auto put) { put(row + i, get(x + i)); });
  std::memset(row + w.depth, 0, (w.padded() - w.depth) * sizeof(bf16));
  if (w.format == WeightFormat::bf16) return;
  auto* sums = reinterpret_cast<float*>(row + w.padded());
  for (int64_t k = 0; k < w.padded(); k += 32) {
    if (w.format == WeightFormat::int4) *sums++ = sum(load(row + k) + load(row + k + kLanes));
    const __m512i pairs = _mm512_loadu_si512(row + k);
    constexpr int kOrder = 0xd8;  // 0, 2, 1, 3
    _mm512_storeu_si512(row + k,
                        _mm512_maskz_shufflehi_epi16(~0u, _mm512_maskz_shufflelo_epi16(~0u, pairs, kOrder), kOrder));
  }
}

// What codes of 4 bits mean before their scales, in bf16, twice: vpermw counts the low 5 bits of an index.
struct CodeValues {
  alignas(64) uint16_t at[32];
  template <class Value>
  constexpr explicit CodeValues(Value&& value) : at{} {
    for (int i = 0; i < 32; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(value(i % 16));
      at[i] = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
  }
};
constexpr CodeValues kNf4Values([](int code) { return kNf4[code]; });
constexpr CodeValues kInt4Values([](int code) { return static_cast<float>(code - 8); });

// Elements 0 and 2, 1 and 3, 4 and 6, 5 and 7 of a word of codes: their places are 16 bits apart.
FINETUNE_INLINE __m512i code_pair(__m512i word, int which, __m512i values) {
  constexpr int kShift[] = {0, 8, 4, 12};
  return _mm512_maskz_permutexvar_epi16(~0u, which ? _mm512_maskz_srli_epi32(0xffff, word, kShift[which]) : word,
                                        values);
}

// How far ahead of word i the first rows of x ask for the weights, in words: 4 KB of each panel that is read, where one
// panel of codes is 8 KB; behind the end of two panels come the next two.
template <int kPanels>
FINETUNE_INLINE int64_t ahead_of(int64_t i, const PackedWeight& w) {
  const int64_t ahead = kPanels == 1 && w.format != WeightFormat::bf16 ? 128 : 64, words = w.words();
  return (ahead + (i + ahead < words ? 0 : (kPanels - 1) * words)) * kPanel;
}

template <int kRows, int kPanels, class Emit>
FINETUNE_INLINE void emit_tile(const __m512 (&sum)[kRows][kPanels], int64_t panel, int64_t row, Emit&& emit) {
  alignas(64) float y[kRows * kPanels][kPanel];
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) _mm512_store_ps(y[r * kPanels + p], sum[r][p]);
  }
  for (int i = 0; i < kRows * kPanels; ++i) {
    emit(panel + i % kPanels, row + i / kPanels, static_cast<const float*>(y[i]));
  }
}

struct BlockScales {
  __m512 scale, minimum;
};
template <bool kMinima>
FINETUNE_INLINE BlockScales block_scales(const PackedWeight& w, int64_t group) {
  BlockScales out{};
  if (w.group) out.scale = (__m512)of_group(w.scale, w.half_scales, group).part[0];
  if constexpr (kMinima) out.minimum = (__m512)of_group(w.minimum, w.half_scales, group).part[0];
  return out;
}

// Sums of a group or of 64 elements, which need not wait for each other, then the sum of those, times their scales.
template <WeightFormat kFormat, bool kMinima, int kRows, int kPanels, class Emit>
FINETUNE_INLINE void tile_bf16(const PackedWeight& w, const Prepared& x, int64_t panel, int64_t row, Emit&& emit) {
  constexpr bool kCodes = kFormat != WeightFormat::bf16;
  constexpr int kEach = kCodes ? 4 : 1;                                          // pairs in a word
  constexpr int kWords = (kFormat == WeightFormat::int4 ? 32 : 64) / 2 / kEach;  // of a block
  const int64_t words = w.words(), blocks = words / kWords;
  const auto* codes = static_cast<const uint32_t*>(w.codes) + panel * words * kPanel;
  const char *from = x.data + row * x.row, *sums = from + 2 * w.padded();
  const __m512i values = _mm512_load_si512(kFormat == WeightFormat::nf4 ? kNf4Values.at : kInt4Values.at);
  __m512 sum[kRows][kPanels];
  for (auto& of_row : sum) {
    for (auto& s : of_row) s = _mm512_setzero_ps();
  }
  for (int64_t block = 0; block < blocks; ++block) {
    __m512 part[kRows][kPanels];
    for (auto& of_row : part) {
      for (auto& s : of_row) s = _mm512_setzero_ps();
    }
    for (int64_t i = block * kWords; i < (block + 1) * kWords; ++i) {
      __m512i word[kPanels];
      for (int p = 0; p < kPanels; ++p) word[p] = _mm512_loadu_si512(codes + (p * words + i) * kPanel);
      if (row == 0) {
        const uint32_t* const ahead = codes + i * kPanel + ahead_of<kPanels>(i, w);
        for (int p = 0; p < kPanels; ++p) __builtin_prefetch(ahead + p * words * kPanel);
      }
      for (int e = 0; e < kEach; ++e) {
        __m512i weights[kPanels];
        for (int p = 0; p < kPanels; ++p) weights[p] = kCodes ? code_pair(word[p], e, values) : word[p];
        for (int r = 0; r < kRows; ++r) {
          const __m512i pair = bytes4(from + r * x.row + 4 * (i * kEach + e));
          for (int p = 0; p < kPanels; ++p) {
            part[r][p] = _mm512_dpbf16_ps(part[r][p], (__m512bh)weights[p], (__m512bh)pair);
          }
        }
      }
    }
    for (int p = 0; p < kPanels; ++p) {
      if constexpr (kCodes) {
        BlockScales of = block_scales<kMinima>(w, (panel + p) * blocks + block);
        if constexpr (kMinima) of.minimum = _mm512_fmadd_ps(of.scale, _mm512_set1_ps(8), of.minimum);
        for (int r = 0; r < kRows; ++r) {
          sum[r][p] = _mm512_fmadd_ps(part[r][p], of.scale, sum[r][p]);
          if constexpr (kMinima) {
            const __m512 of_x = (__m512)bytes4(sums + r * x.row + 4 * block);
            sum[r][p] = _mm512_fmadd_ps(of.minimum, of_x, sum[r][p]);
          }
        }
      } else {
        for (int r = 0; r < kRows; ++r) sum[r][p] = _mm512_add_ps(sum[r][p], part[r][p]);
      }
    }
  }
  emit_tile<kRows, kPanels>(sum, panel, row, emit);
}

// What a block adds to a row's sum: `total` is that of its unsigned codes, `offset` as prepare_integers left it.
template <bool kMinima>
FINETUNE_INLINE __m512 add_block(const PackedWeight& w, const BlockScales& of, __m512i total, __m512i offset,
                                 __m512 sum) {
  if constexpr (!kMinima) total = _mm512_add_epi32(total, offset);
  const __m512 value = _mm512_maskz_cvtepi32_ps(0xffff, total);
  sum = w.group ? _mm512_fmadd_ps(of.scale, value, sum) : _mm512_add_ps(sum, value);
  if constexpr (kMinima) sum = _mm512_fmadd_ps(of.minimum, (__m512)offset, sum);
  return sum;
}

// The sum of all blocks in units of W x.
FINETUNE_INLINE __m512 scaled(const PackedWeight& w, const char* row, int64_t panel, __m512 sum) {
  float factor;
  std::memcpy(&factor, row, sizeof factor);
  if (!w.group) sum = _mm512_mul_ps(sum, (__m512)of_group(w.scale, w.half_scales, panel).part[0]);
  return _mm512_mul_ps(sum, _mm512_set1_ps(factor));
}

// Two passes over a block, high bytes and then low ones, leave registers for twice the rows; few rows take both in one.
template <WeightFormat kFormat, bool kMinima, int kRows, int kPanels, class Emit>
FINETUNE_INLINE void tile_integers(const PackedWeight& w, const Prepared& x, int64_t panel, int64_t row, Emit&& emit) {
  constexpr bool kCodes4 = kFormat == WeightFormat::int4;
  constexpr int kEach = kCodes4 ? 2 : 1;  // steps that a word takes
  constexpr int kPasses = kRows <= 4 ? 1 : 2, kSums = 3 - kPasses;
  const Blocks blocks(w);
  const int64_t words = w.words(), step = blocks.block / (kCodes4 ? 8 : 4), x_row = x.row;
  const auto* codes = static_cast<const uint32_t*>(w.codes) + panel * words * kPanel;
  const char* from = x.data + row * x_row;
  const auto* offsets = from + kHigh + 2 * blocks.depth;
  const __m512i code = _mm512_set1_epi32(0x0f0f0f0f);
  __m512 sum[kRows][kPanels];
  for (auto& of_row : sum) {
    for (auto& s : of_row) s = _mm512_setzero_ps();
  }
  for (int64_t b = 0; b < blocks.count; ++b) {
    __m512i dot[kSums][kRows][kPanels];
    const int64_t first = b * step, last = first + step < words ? first + step : words;
    for (int pass = 0; pass < kPasses; ++pass) {
      for (int r = 0; r < kRows; ++r) {
        for (int p = 0; p < kPanels; ++p) {
          for (int s = 0; s < kSums; ++s) {
            if (pass == 0) {
              dot[s][r][p] = _mm512_setzero_si512();
            } else {
              dot[s][r][p] = _mm512_maskz_slli_epi32(0xffff, dot[s][r][p], 8);
            }
          }
        }
      }
      const char* bytes = from + kHigh + pass * blocks.depth;
      for (int64_t i = first; i < last; ++i) {
        __m512i word[kPanels];
        for (int p = 0; p < kPanels; ++p) {
          word[p] = _mm512_loadu_si512(codes + (p * words + i) * kPanel);
          if (row == 0 && pass == 0) __builtin_prefetch(codes + (p * words + i) * kPanel + ahead_of<kPanels>(i, w));
        }
        for (int e = 0; e < kEach; ++e) {
          __m512i weights[kPanels];
          for (int p = 0; p < kPanels; ++p) {
            weights[p] = e ? _mm512_maskz_srli_epi32(0xffff, word[p], 4 * e) : word[p];
            if constexpr (kCodes4) weights[p] = _mm512_and_si512(weights[p], code);
          }
          for (int r = 0; r < kRows; ++r) {
            for (int s = 0; s < kSums; ++s) {
              const __m512i four = bytes4(bytes + s * blocks.depth + r * x_row + 4 * (i * kEach + e));
              for (int p = 0; p < kPanels; ++p) {
                dot[s][r][p] = _mm512_dpbusd_epi32(dot[s][r][p], weights[p], four);
              }
            }
          }
        }
      }
    }
    BlockScales scales[kPanels];
    for (int p = 0; p < kPanels; ++p) scales[p] = block_scales<kMinima>(w, (panel + p) * blocks.count + b);
    for (int r = 0; r < kRows; ++r) {
      const __m512i offset = bytes4(offsets + r * x_row + 4 * b);
      for (int p = 0; p < kPanels; ++p) {
        __m512i total = dot[0][r][p];
        if constexpr (kSums == 2) total = _mm512_add_epi32(_mm512_maskz_slli_epi32(0xffff, total, 8), dot[1][r][p]);
        sum[r][p] = add_block<kMinima>(w, scales[p], total, offset, sum[r][p]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) sum[r][p] = scaled(w, from + r * x_row, panel + p, sum[r][p]);
  }
  emit_tile<kRows, kPanels>(sum, panel, row, emit);
}

// Panels [first, last) × rows [0, m) in tiles: body.template operator()<rows, panels>(panel, row). Up to 4 rows take one
// panel after another, for memory is read fastest in order; more take two at once, which share the broadcasts.
template <class Body>
FINETUNE_INLINE void in_blocks(int64_t m, int64_t first, int64_t last, Body&& body) {
  int64_t panel = first;
  const auto with = [&]<int kRows, int kPanels>() {
    for (; panel + kPanels <= last; panel += kPanels) {
      in_tiles<kRows>(m, [&]<int kHere>(int64_t row) { body.template operator()<kHere, kPanels>(panel, row); });
    }
  };
  if (m > 4) with.template operator()<8, 2>();
  m > 4 ? with.template operator()<8, 1>() : with.template operator()<4, 1>();
}

template <class Emit>
void product_bf16(const PackedWeight& w, const Prepared& x, int64_t m, int64_t first, int64_t last, Emit&& emit) {
  const auto with = [&]<WeightFormat kFormat, bool kMinima>() {
    in_blocks(m, first, last, [&]<int kRows, int kPanels>(int64_t panel, int64_t row) {
      tile_bf16<kFormat, kMinima, kRows, kPanels>(w, x, panel, row, emit);
    });
  };
  if (w.format == WeightFormat::nf4) return with.template operator()<WeightFormat::nf4, false>();
  if (w.format == WeightFormat::bf16) return with.template operator()<WeightFormat::bf16, false>();
  if (w.minimum) return with.template operator()<WeightFormat::int4, true>();
  with.template operator()<WeightFormat::int4, false>();
}

template <class Emit>
void product_integers(const PackedWeight& w, const Prepared& x, int64_t m, int64_t first, int64_t last, Emit&& emit) {
  const auto with = [&]<WeightFormat kFormat, bool kMinima>() {
    in_blocks(m, first, last, [&]<int kRows, int kPanels>(int64_t panel, int64_t row) {
      tile_integers<kFormat, kMinima, kRows, kPanels>(w, x, panel, row, emit);
    });
  };
  if constexpr (kIntegers4) {
    if (w.format == WeightFormat::int4 && w.minimum) return with.template operator()<WeightFormat::int4, true>();
    if (w.format == WeightFormat::int4) return with.template operator()<WeightFormat::int4, false>();
  }
  with.template operator()<WeightFormat::int8, false>();
}

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
