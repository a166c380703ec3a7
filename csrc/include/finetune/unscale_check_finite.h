// Gradients unscaled, checked and measured in one pass; the definition is finetune/ops/unscale_check_finite.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

// A run of elements of one tensor: on the CPU at most UnscaleCheckFinite::piece of them, on CUDA a whole tensor.
struct UnscalePiece {
  void* data;
  int64_t size;
  DType dtype;
};

struct UnscaleCheckFinite {
  const UnscalePiece* pieces;
  int64_t count;
  float inverse;
  double* squares;    // (count,) the sum of squares of each unscaled piece
  int32_t* overflow;  // (count,) 1 where a piece was not finite
  static constexpr int64_t piece = 32768;
};

struct UnscaleCheckFiniteCuda {
  const UnscalePiece* pieces;
  int64_t count;
  const float* inverse;
  float* squares;   // (blocks,) the sum of squares of each block's elements, `block` of one tensor at most
  float* overflow;  // (blocks,) 1 where a block was not finite
  int64_t blocks;
  float *found_inf, *square;
  static constexpr int64_t block = 16384;
};

}  // namespace finetune
