// GroupNorm and SiLU of (images, channels, positions); the definition is finetune/ops/group_norm_silu.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

struct GroupNormSilu {
  DType dtype;         // of x, weight, bias and y
  const void* x;       // (images, channels, positions)
  const void* weight;  // (channels,)
  const void* bias;    // (channels,)
  void* y;             // (images, channels, positions)
  float* mean;         // (images, groups) kept for the backward pass, as is; 0 for a group without elements
  float* rstd;         // (images, groups) 1 / sqrt(variance + eps)
  int64_t images, channels, positions, groups;
  float eps;
};

struct GroupNormSiluBackward {
  DType dtype;         // of dy, x, weight, bias, dx, dweight and dbias
  const void* dy;      // (images, channels, positions)
  const void* x;       // (images, channels, positions)
  const void* weight;  // (channels,)
  const void* bias;    // (channels,)
  const float* mean;   // (images, groups)
  const float* rstd;   // (images, groups)
  void* dx;            // (images, channels, positions)
  void* dweight;       // (channels,)
  void* dbias;         // (channels,)
  float* partial;      // (2, images, channels): the sums over positions that become dweight and dbias
  int64_t images, channels, positions, groups;
};

}  // namespace finetune
