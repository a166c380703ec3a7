// Products with weights in few bits on a GPU; the definition is finetune/ops/quantized_linear.py, the weight's layout is
// made by finetune/ops/_fragments.py.
#pragma once

#include "finetune/packed.h"

namespace finetune {

struct QuantizedLinearCuda {
  DType dtype;  // of x, bias and y
  WeightFormat format;
  int64_t rows, depth, group;  // of the weight; group: terms that share a scale, 0: one scale a row, or none
  int64_t panels, tiles;       // of 32 rows, and of 32 terms along depth
  const void* codes;           // (panels, tiles, chunks of a lane, 32 lanes, 16 bytes)
  const void* scale;           // (panels, groups, 8, 4[, 2]), or (panels · 32,) one a row; null for fp32 and bf16
  bool half_scales, minima;    // scales in fp16, not fp32; behind each its minimum
  const void* x;               // (m, depth), `stride` elements from row to row
  int64_t stride, m;
  const void* bias;  // (rows,), may be null
  void* y;           // (m, rows)
  float* sums;       // (sums_of_x(),) of every tile and row of x, or null where there are none

  // Rows of x up to which the kernel for few and for some of them run, and those of a block of many. Of many rows of x
  // the tiles' sums, padded to eights, are made in advance.
  static constexpr int64_t few = 8, some = 32, many = 64;
  int64_t sums_of_x() const {
    return format == WeightFormat::int4 && dtype != DType::f32 && m > some ? tiles * ((m + 7) / 8 * 8) : 0;
  }
};

}  // namespace finetune
