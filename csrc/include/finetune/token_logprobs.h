// Log-probabilities of given tokens and entropies from logits; the definition is finetune/ops/token_logprobs.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

struct TokenLogprobs {
  DType dtype;             // of the logits
  const void* logits;      // (rows, vocab), elements of a row adjacent
  const int64_t* targets;  // (rows,) in [0, vocab), on the CPU the caller has checked, or ignore_index
  float* logprobs;         // (rows,)
  float* entropy;          // (rows,), or null
  float* stats;            // (2, rows) the largest logit m, and log Σ exp((logit − m) / temperature)
  int64_t rows, vocab;
  int64_t stride;  // elements from one row of logits to the next
  int64_t ignore_index;
  float inverse;  // 1 / temperature
};

struct TokenLogprobsBackward {
  DType dtype;             // of logits and dlogits
  const float* dlogprobs;  // (rows,), or null
  const float* dentropy;   // (rows,), or null
  const void* logits;      // (rows, vocab)
  const int64_t* targets;  // (rows,)
  const float* entropy;    // (rows,); read with dentropy only
  const float* stats;      // (2, rows)
  void* dlogits;           // (rows, vocab), contiguous
  int64_t rows, vocab, stride, ignore_index;
  float inverse;
};

}  // namespace finetune
