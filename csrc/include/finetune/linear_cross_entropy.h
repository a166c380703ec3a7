// The steps of linear_cross_entropy between the matrix products, which are torch's
// (csrc/bindings/linear_cross_entropy.cpp, which also explains blocks and tiles).
// The definition is finetune/ops/linear_cross_entropy.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

// A block of rows of logits for a tile of the vocabulary.
struct LogitTile {
  DType dtype;
  void* data;              // (rows, size)
  const int64_t* targets;  // (rows,) in [0, vocab)
  int64_t rows, size;
  int64_t first;  // the tile's first word
};

// What a row's softmax needs of one tile.
struct CrossEntropyTile {
  LogitTile logits;
  float* top;   // (rows,) the maximum
  double* sum;  // (rows,) Σ exp(logit − top)
  float* hit;   // (rows,) the target's logit, written where the target lies in this tile
};

// Joins the tiles of each row.
struct CrossEntropyLoss {
  const float* tops;           // (tiles, stride), the first `rows` of each
  const double* sums;          // the same
  const float* hits;           // (rows,)
  float *loss, *top, *factor;  // (rows,) loss, not scaled; maximum; d(loss · scale)/d(logit) / exp(logit − top)
  int64_t rows, stride, tiles;
  float z_loss, scale;
};

// Overwrites the logits of a tile with d(loss · scale)/d(logit).
struct CrossEntropyGrad {
  LogitTile logits;
  const float *hit, *top, *factor;  // (rows,)
  float scale;
};

// out = Σ parts, in the order of the parts.
struct SumParts {
  const void* parts;  // (count, size)
  void* out;          // (size,)
  DType part_dtype, out_dtype;
  int64_t count, size;
};

// sum (+)= part, for one thread.
struct AddPart {
  const void* part;  // (size,) bf16
  float* sum;        // (size,)
  int64_t size;
  bool add;  // false: sum = part
};

}  // namespace finetune
