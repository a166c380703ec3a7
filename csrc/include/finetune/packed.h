// Weights packed for the CPU: finetune/ops/quantized_linear.py defines the formats and packs (its layout "cpu").
#pragma once

#include "finetune/kernel.h"

namespace finetune {

enum class WeightFormat : int { fp32, bf16, int8, int4, nf4 };

// What a weight (rows, depth) looks like in memory: panels of kPanel rows, depth padded with zeros to a multiple of
// kDepthStep. A panel holds for each step along depth one 32-bit word a row: 1 element of fp32, 2 of bf16, 4 of int8
// (code + 128), 8 of 4 bits (elements 0 … 3 in the low halves of the word's bytes, 4 … 7 in the high ones).
constexpr int64_t kPanel = 16, kDepthStep = 64;

struct PackedWeight {
  WeightFormat format;
  int64_t rows, depth;
  int64_t group;        // elements along depth that share a scale: 16, 32 or 64; 0: one scale a row, or none
  const void* codes;    // (panels, padded depth / elements a word, kPanel) words
  const void* scale;    // (panels, groups, kPanel); null for fp32 and bf16
  const void* minimum;  // like scale, or null: int4 without it has weights scale · (code − 8)
  bool half_scales;     // scale and minimum are fp16, not fp32

  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  int64_t padded() const { return (depth + kDepthStep - 1) / kDepthStep * kDepthStep; }
  int64_t groups() const { return group ? padded() / group : 1; }
  int64_t words() const {  // of a panel's codes, a row
    const int64_t k = padded();
    return format == WeightFormat::fp32   ? k
           : format == WeightFormat::bf16 ? k / 2
           : format == WeightFormat::int8 ? k / 4
                                          : k / 8;
  }
};

// What the activations become before the product (csrc/cpu/packed_product.h).
enum class Activations : int {
  f32,   // as they are
  bf16,  // rounded to bf16; for codes of 4 bits in the order of their look-ups, for int4 with the sums over groups
  i16,   // integers of the row's largest magnitude / 32639, their high and low bytes apart, and their sums over groups
};

struct Prepared {
  Activations kind;
  char* data;  // `row` bytes from one row of x to the next, whose layout is packed_product.h's
  int64_t row;
};

// Bytes that m prepared rows of x need at the most, on every level; the memory must be aligned to 64 bytes.
inline int64_t prepared_bytes(int64_t m, int64_t depth) {
  return m * ((depth + kDepthStep - 1) / kDepthStep * kDepthStep * 4 + 64);
}

}  // namespace finetune
