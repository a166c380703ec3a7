// The L2 norm of many tensors together; the definition is finetune/ops/global_norm.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

// A run of elements of one tensor: on the CPU at most GlobalNorm::piece of them, on CUDA a whole tensor.
struct NormPiece {
  const void* data;
  int64_t size;
  DType dtype;
};

struct GlobalNorm {
  const NormPiece* pieces;
  double* squares;  // (count,) the sum of squares of each piece
  int64_t count;
  static constexpr int64_t piece = 32768;
};

struct GlobalNormCuda {
  const NormPiece* pieces;
  int64_t count;
  float* squares;  // (blocks,) the sum of squares of each block's elements, `block` of one tensor at most
  int64_t blocks;
  float* norm;
  static constexpr int64_t block = 16384;
};

}  // namespace finetune
