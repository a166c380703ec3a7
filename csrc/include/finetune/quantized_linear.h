// Products with weights in few bits; the definition is finetune/ops/quantized_linear.py.
#pragma once

#include "finetune/packed.h"

namespace finetune {

struct QuantizedLinear {
  DType dtype;  // of x, bias and y
  PackedWeight weight;
  const void* x;  // (m, depth), `stride` elements from row to row
  int64_t stride, m;
  const void* bias;  // (rows,), may be null
  void* y;           // (m, rows)
  char* workspace;   // prepared_bytes(m, depth)
};

}  // namespace finetune
