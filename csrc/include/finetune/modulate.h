// adaLN's modulation of (items, rows, dim); the definition is finetune/ops/modulate.py.
#pragma once

#include "finetune/item_split.h"
#include "finetune/kernel.h"

namespace finetune {

struct Modulate {
  DType dtype;        // of x, shift, scale and y
  const void* x;      // (items, rows, dim)
  const void* shift;  // (items, dim), elements of a row adjacent
  const void* scale;  // (items, dim), elements of a row adjacent
  void* y;            // (items, rows, dim)
  float* mean;        // (items, rows) kept for the backward pass, as is
  float* rstd;        // (items, rows) 1 / sqrt(variance + eps)
  int64_t items, rows, dim;
  int64_t shift_stride, scale_stride;  // elements from one item to the next
  float eps;
};

struct ModulateBackward {
  DType dtype;        // of dy, x, scale, dx, dshift and dscale
  const void* dy;     // (items, rows, dim)
  const void* x;      // (items, rows, dim)
  const void* scale;  // (items, dim), elements of a row adjacent
  const float* mean;  // (items, rows)
  const float* rstd;  // (items, rows)
  void* dx;           // (items, rows, dim)
  void* dshift;       // (items, dim)
  void* dscale;       // (items, dim)
  float* partial;     // scratch() floats: (blocks, items, dim) for dscale, the same for dshift, then a row's two means
  int64_t items, rows, dim;
  int64_t scale_stride;

  static constexpr int64_t scratch(bool device, int64_t items, int64_t rows, int64_t dim) {
    const bool means = device && NormSplit(rows, dim).tiles > 1;
    return item_scratch(device, items, rows, dim, 2) + (means ? 2 * items * rows : 0);
  }
};

}  // namespace finetune
