// Generalized advantage estimation; the definition is finetune/ops/gae.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

struct Gae {
  DType dtype;              // of rewards, values and next_values
  const void* rewards;      // (steps, columns)
  const void* values;       // (steps, columns)
  const void* next_values;  // (steps, columns)
  const bool* terminated;   // (steps, columns)
  const bool* truncated;    // (steps, columns)
  void* advantages;         // (steps, columns) fp32, or f64 of f64
  void* returns;            // (steps, columns) of the same dtype
  int64_t steps, columns;
  double gamma, decay;  // decay = γ λ
};

}  // namespace finetune
