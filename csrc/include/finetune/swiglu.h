// SwiGLU of two (rows, dim) inputs; the definition is finetune/ops/swiglu.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

struct Swiglu {
  DType dtype;       // of gate, up and y
  const void* gate;  // (rows, dim), elements of a row adjacent
  const void* up;    // (rows, dim), elements of a row adjacent
  void* y;           // (rows, dim), contiguous
  int64_t rows, dim;
  int64_t gate_stride, up_stride;  // elements from one row to the next
};

struct SwigluBackward {
  DType dtype;  // of all
  const void* dy;
  const void* gate;
  const void* up;
  void* dgate;  // (rows, dim), contiguous
  void* dup;    // (rows, dim), contiguous
  int64_t rows, dim;
  int64_t dy_stride, gate_stride, up_stride;
};

}  // namespace finetune
