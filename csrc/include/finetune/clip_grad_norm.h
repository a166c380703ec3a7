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

// The CUDA kernels' form: whole tensors, and everything between the norm and the scaling stays on the device.
struct ClipGradNorm {
  struct Tensor {
    void* data;
    int64_t size;
    DType dtype;
  };
  const Tensor* tensors;  // (count,) on the host
  int64_t count;
  float* squares;  // (pieces,) the sum of squares of each piece of at most GradNorm::piece elements, tensor by tensor
  int64_t pieces;
  float *norm, *scale;  // one each
  double max_norm;
};

}  // namespace finetune
