// The L2 norm of many tensors together, and their scaling; the definition is finetune/ops/clip_grad_norm.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

// A run of elements of one tensor. The cut into pieces of at most `GradNorm::piece` elements fixes the order of the
// sum, so that it does not depend on the number of threads.
struct GradPiece {
  void* data;
  int64_t size;
  DType dtype;
};

struct GradNorm {
  const GradPiece* pieces;
  double* squares;  // (count,) the sum of squares of each piece
  int64_t count;
  static constexpr int64_t piece = 32768;
};

struct GradScale {
  const GradPiece* pieces;
  int64_t count;
  float scale;
};

}  // namespace finetune
