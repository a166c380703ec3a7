// Rotary position embedding; the definition is finetune/ops/rope.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

struct Rope {
  DType dtype;               // of x and y
  const void* x;             // (batch, length, heads, dim), elements of a head adjacent
  const float* cos;          // (max_length, dim / 2)
  const float* sin;          // (max_length, dim / 2)
  const int64_t* positions;  // (batch, length), each in [0, max_length): on the CPU the caller has checked
  void* y;                   // (batch, length, heads, dim), contiguous
  int64_t batch, length, heads, dim, max_length;
  int64_t stride_batch, stride_length, stride_head;  // of x, in elements
  bool inverse;                                      // rotate by −θ: the backward pass
};

}  // namespace finetune
