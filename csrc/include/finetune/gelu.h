// GELU of a contiguous input; the definition is finetune/ops/gelu.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

struct Gelu {
  DType dtype;  // of x and y
  const void* x;
  void* y;
  int64_t size;
};

struct GeluBackward {
  DType dtype;  // of all
  const void* dy;
  const void* x;
  void* dx;
  int64_t size;
};

}  // namespace finetune
