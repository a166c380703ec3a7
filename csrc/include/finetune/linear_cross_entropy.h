// The steps of linear_cross_entropy between the matrix products, which are torch's
// (csrc/bindings/linear_cross_entropy.cpp, which also explains blocks and tiles).
// The definition is finetune/ops/linear_cross_entropy.py.
#pragma once

#include <algorithm>

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

// All of it, on a GPU (csrc/cuda/linear_cross_entropy.cu explains the scratch).
struct LinearCrossEntropy {
  static constexpr int64_t side = 128;    // of the square of logits that a block makes
  static constexpr int64_t chunk = 4096;  // rows, and
  static constexpr int64_t tile = 4096;   // words whose logits' gradients exist at once, in the inputs' dtype

  DType dtype;             // of x, weight, dx and dweight
  const void* x;           // (rows, dim)
  const void* weight;      // (vocab, dim)
  const int64_t* targets;  // (rows,)
  float* loss;             // one
  void* dx;                // (rows, dim), or null
  void* dweight;           // (vocab, dim), or null
  int64_t* kept;           // (rows,) the rows that count, in order
  int64_t* place;          // (rows,) a row's place in `kept`, or −1
  int64_t* count;          // one: how many
  float* part_m;           // (parts, rows) maximum of a part of a row's logits
  float* part_l;           // (parts, rows) and its Σ exp(logit − maximum)
  float* per_row;          // (4, rows) target's logit, maximum, d loss/d logit / exp(logit − maximum), loss
  void* dlogits;           // (chunk, tile)
  float* dx_sum;           // (dx_splits, rows, dim)
  float* dweight_sum;      // (tile, dim)
  int64_t rows, dim, vocab, ignore_index;
  float z_loss;
  bool mean;

  static int64_t sides(int64_t n) { return (n + side - 1) / side; }
  // Blocks along the vocabulary in the forward pass: enough of them in all to fill a GPU, if each has four squares.
  int64_t splits() const { return std::clamp<int64_t>(512 / sides(rows), 1, (sides(vocab) + 3) / 4); }
  int64_t parts() const { return 2 * splits(); }  // each block's halves by columns
  // Parts of a tile's words that dX is summed over separately: a function of the sizes alone.
  int64_t dx_splits() const {
    return std::clamp<int64_t>(256 / std::max<int64_t>(sides(chunk_here()) * sides(dim), 1), 1, 8);
  }
  int64_t tile_here() const { return std::min(tile, sides(vocab) * side); }
  int64_t chunk_here() const { return std::min(chunk, rows); }
};

}  // namespace finetune
