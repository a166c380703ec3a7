// Clipping by the L2 norm of many tensors together; the definition is finetune/ops/clip_grad_norm.py.
#pragma once

#include "finetune/pieces.h"

namespace finetune {

// After a GlobalNorm of the same pieces.
struct GradScale {
  const Piece* pieces;
  int64_t count;
  float scale;
};

// The CUDA kernels' form: everything between the norm and the scaling stays on the device.
struct ClipGradNormCuda {
  const Piece* pieces;
  int64_t count;
  float* squares;  // (blocks,) the sum of squares of each block's elements
  int64_t blocks;
  float *norm, *scale;
  double max_norm;
};

}  // namespace finetune
