// The L2 norm of many tensors together; the definition is finetune/ops/global_norm.py.
#pragma once

#include "finetune/pieces.h"

namespace finetune {

struct GlobalNorm {
  const Piece* pieces;
  int64_t count;
  double* squares;  // (count,) the sum of squares of each piece
};

struct GlobalNormCuda {
  const Piece* pieces;
  int64_t count;
  float* squares;  // (blocks,) the sum of squares of each block's elements
  int64_t blocks;
  float* norm;
};

}  // namespace finetune
