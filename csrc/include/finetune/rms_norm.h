// RMSNorm over the last dimension of (rows, dim); the definition is finetune/ops/rms_norm.py.
#pragma once

#include "finetune/kernel.h"
#include "finetune/norm_split.h"

namespace finetune {

struct RmsNorm {
  DType dtype;         // of x, weight and y
  const void* x;       // (rows, dim)
  const void* weight;  // (dim,)
  void* y;             // (rows, dim)
  float* rstd;         // (rows,) 1 / sqrt(mean(x²) + eps), kept for the backward pass
  int64_t rows, dim;
  float eps;
};

struct RmsNormBackward {
  DType dtype;         // of dy, x, weight, dx and dweight
  const void* dy;      // (rows, dim)
  const void* x;       // (rows, dim)
  const void* weight;  // (dim,)
  const float* rstd;   // (rows,)
  void* dx;            // (rows, dim)
  void* dweight;       // (dim,), or null where the weight is frozen
  float* partial;      // scratch for dweight: scratch() floats
  int64_t rows, dim;
  static constexpr int64_t blocks = 32;  // row blocks of dweight's sum on the CPU: fixed, so that threads change no bit

  static constexpr int64_t scratch(bool device, int64_t rows, int64_t dim, bool sums) {
    return device ? NormSplit(rows, dim).scratch(rows, dim, sums, 1) : sums * blocks * dim;
  }
};

}  // namespace finetune
