// One AdamW step over many tensors at once; the definition is finetune/ops/adamw.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

// A run of elements of one tensor. On the CPU the caller cuts every tensor into pieces of at most `AdamW::piece`
// elements, so that one parallel loop covers large and small tensors alike; on CUDA a piece is a tensor.
struct AdamWPiece {
  void* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* master;  // fp32 copy that is updated and then rounded to param; null: param itself is updated
  int64_t size;
  DType param_dtype, grad_dtype;
};

// The numbers of a step, those of all elements.
struct AdamWStep {
  float grad_scale;           // multiplies every gradient
  const float* scale_tensor;  // CUDA only, may be null: a number in device memory that multiplies them too
  float decay;                // 1 - lr · weight_decay
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float step_size;  // lr / (1 - beta1^step)
  float rsqrt_bc2;  // 1 / sqrt(1 - beta2^step)
  float eps;
};

struct AdamW : AdamWStep {
  const AdamWPiece* pieces;
  int64_t count;
  static constexpr int64_t piece = 32768;
};

}  // namespace finetune
