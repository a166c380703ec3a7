// One AdamW step with moments of 8 bits over many tensors at once; the definition is finetune/ops/adamw8bit.py.
#pragma once

#include "finetune/adamw.h"

namespace finetune {

// A run of elements of one tensor that begins with a block. On the CPU the caller cuts every tensor into pieces of at
// most `AdamW8bit::piece` elements; on CUDA a piece is a tensor.
struct AdamW8bitPiece {
  void* param;
  const void* grad;
  uint8_t *exp_avg, *exp_avg_sq;        // codes
  float *exp_avg_max, *exp_avg_sq_max;  // largest magnitude of each block
  float* master;                        // fp32 copy that is updated and then rounded to param, or null
  int64_t size;
  DType param_dtype, grad_dtype;
};

struct AdamW8bit : AdamWStep {
  const AdamW8bitPiece* pieces;
  int64_t count;
  const float* maps;     // (2, 256) values of the codes in rising order, of exp_avg and of exp_avg_sq
  const float* middles;  // (2, 256) between each code and the next, then infinity
  static constexpr int64_t block = 256, piece = 128 * block;
};

}  // namespace finetune
