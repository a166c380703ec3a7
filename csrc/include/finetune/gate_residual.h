// Gate and residual sum of (items, rows, dim); the definition is finetune/ops/gate_residual.py.
#pragma once

#include "finetune/item_split.h"
#include "finetune/kernel.h"

namespace finetune {

struct GateResidual {
  DType dtype;         // of x, gate, branch and y
  const void* x;       // (items, rows, dim)
  const void* gate;    // (items, dim), elements of a row adjacent
  const void* branch;  // (items, rows, dim)
  void* y;             // (items, rows, dim)
  int64_t items, rows, dim;
  int64_t gate_stride;  // elements from one item to the next
};

struct GateResidualBackward {
  DType dtype;         // of dy, gate, branch, dgate and dbranch
  const void* dy;      // (items, rows, dim)
  const void* gate;    // (items, dim), elements of a row adjacent
  const void* branch;  // (items, rows, dim)
  void* dgate;         // (items, dim)
  void* dbranch;       // (items, rows, dim)
  float* partial;      // (blocks, items, dim): item_scratch() floats
  int64_t items, rows, dim;
  int64_t gate_stride;
};

}  // namespace finetune
