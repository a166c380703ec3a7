// LayerNorm over the last dimension of (rows, dim); the definition is finetune/ops/layer_norm.py.
#pragma once

#include "finetune/kernel.h"
#include "finetune/norm_split.h"

namespace finetune {

struct LayerNorm {
  DType dtype;         // of x, weight, bias and y
  const void* x;       // (rows, dim)
  const void* weight;  // (dim,)
  const void* bias;    // (dim,), or null
  void* y;             // (rows, dim)
  float* mean;         // (rows,) kept for the backward pass, as is
  float* rstd;         // (rows,) 1 / sqrt(variance + eps)
  int64_t rows, dim;
  float eps;
};

struct LayerNormBackward {
  DType dtype;         // of dy, x, weight, dx, dweight and dbias
  const void* dy;      // (rows, dim)
  const void* x;       // (rows, dim)
  const void* weight;  // (dim,)
  const float* mean;   // (rows,)
  const float* rstd;   // (rows,)
  void* dx;            // (rows, dim)
  void* dweight;       // (dim,), or null where the weight is frozen
  void* dbias;         // (dim,), or null where the bias is frozen or there is none
  float* partial;      // scratch for dweight and dbias: scratch() floats
  int64_t rows, dim;
  static constexpr int64_t blocks = 32;  // row blocks of the sums on the CPU: fixed, so that threads change no bit

  static constexpr int64_t scratch(bool device, int64_t rows, int64_t dim, bool weight, bool bias) {
    return device ? NormSplit(rows, dim).scratch(rows, dim, weight + bias, 2) : (weight || bias) * 2 * blocks * dim;
  }
};

}  // namespace finetune
