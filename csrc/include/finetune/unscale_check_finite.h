// Gradients unscaled, checked and measured in one pass; the definition is finetune/ops/unscale_check_finite.py.
#pragma once

#include "finetune/pieces.h"

namespace finetune {

struct UnscaleCheckFinite {
  const Piece* pieces;
  int64_t count;
  float inverse;
  double* squares;    // (count,) the sum of squares of each unscaled piece
  int32_t* overflow;  // (count,) 1 where a piece was not finite
};

struct UnscaleCheckFiniteCuda {
  const Piece* pieces;
  int64_t count;
  const float* inverse;
  float* squares;   // (blocks,) the sum of squares of each block's elements
  float* overflow;  // (blocks,) 1 where a block was not finite
  int64_t blocks;
  float *found_inf, *square;
};

}  // namespace finetune
