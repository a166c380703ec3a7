// The loss half of linear_cross_entropy, for a block of rows of logits; the matrix products around it are torch's
// (csrc/bindings/linear_cross_entropy.cpp). The definition is finetune/ops/linear_cross_entropy.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

struct CrossEntropyRows {
  DType dtype;             // of logits
  void* logits;            // (rows, vocab); with `grad` they become d(loss · scale)/d(logits)
  const int64_t* targets;  // (rows,) each in [0, vocab)
  float* loss;             // (rows,) not scaled
  int64_t rows, vocab;
  float z_loss, scale;
  bool grad;
};

// sum (+)= part: the gradient of the weight of one chunk of tokens, as a bf16 matrix product leaves it.
struct AddRounded {
  const void* part;  // (size,) bf16
  float* sum;        // (size,)
  int64_t size;
  bool add;  // false: sum = part
};

}  // namespace finetune
