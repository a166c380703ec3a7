// linear_cross_entropy: on the CPU a chunk loop around matrix products that the caller provides
// (csrc/cpu/linear_cross_entropy.cpp), on a GPU all of it (csrc/cuda/linear_cross_entropy.cu).
// The definition is finetune/ops/linear_cross_entropy.py.
#pragma once

#include <algorithm>

#include "finetune/kernel.h"

namespace finetune {

// How the CPU divides the work, a function of the sizes alone. The logits of a chunk of rows exist at once; they are
// made and used by at most `most_tasks` tasks, each a block of the chunk's rows × a tile of the vocabulary: several
// blocks where the vocabulary is small, one block where it is large.
struct LossPlan {
  static constexpr int64_t logit_bytes = 24 << 20;  // of a chunk: 128 rows of SmolLM2's 49152 in fp32
  static constexpr int64_t least_rows = 64;         // of a chunk: with fewer the products are memory bound
  static constexpr int64_t most_tasks = 32, least_tile = 256, least_block = 16;

  int64_t chunk, tile, tiles, block, blocks;

  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // `type`: of the logits.
  static LossPlan of(int64_t n_rows, int64_t vocab, DType type) {
    LossPlan p{};
    const int64_t most_rows = std::max(least_rows, logit_bytes / (vocab * bytes_of(type)));
    p.chunk = ceil_div(n_rows, ceil_div(n_rows, most_rows));
    p.tile = std::max(least_tile, ceil_div(vocab, most_tasks));
    p.tiles = ceil_div(vocab, p.tile);
    p.block = std::max(least_block, ceil_div(p.chunk, std::max<int64_t>(most_tasks / p.tiles, 1)));
    p.blocks = ceil_div(p.chunk, p.block);
    return p;
  }
};

// c (m, n) = a · b, or c += a · b: dense row-major matrices of one dtype, a (m, k) and b (k, n). A transposed one lies
// in memory as (k, m) or (n, k).
struct MatrixProduct {
  DType dtype;
  const void* a;
  const void* b;
  void* c;
  int64_t m, n, k;
  bool a_transposed, b_transposed, add;
};

// All of it, on the CPU. Scratch has the sizes of the plan.
struct ChunkedCrossEntropy {
  DType dtype;                               // of x, weight, dx and dweight: f32 or bf16
  DType type;                                // of the products: dtype, or f32 for bf16 inputs, converted first
  const void* x;                             // (n_rows, n_cols)
  const void* weight;                        // (vocab, n_cols)
  const int64_t* targets;                    // (n_rows,) in [0, vocab)
  double* loss;                              // one: Σ of the rows' losses, not scaled
  void* dx;                                  // (n_rows, n_cols), or null
  void* dweight;                             // (vocab, n_cols), or null
  void* logits;                              // (chunk, vocab) of `type`
  void* x_wide;                              // (chunk, n_cols) of `type`, where x is converted
  float* row_max;                            // (tiles, chunk) maximum of a row's logits in a tile
  double* row_sum;                           // (tiles, chunk) and their Σ exp(logit − maximum)
  float* per_row;                            // (4, chunk) see Rows
  void* dx_parts;                            // (tiles, chunk, n_cols) of `type`, where dx is wanted
  float* dweight_parts;                      // (blocks, vocab, n_cols), where dweight is wanted and not summed in place
  void (*multiply)(const MatrixProduct& p);  // on the calling thread
  LossPlan plan;
  int64_t n_rows, n_cols, vocab;
  float z_loss, scale;

  bool widens() const { return dtype != type; }
  bool sums_in_place() const { return plan.blocks == 1 && dtype == DType::f32; }  // dweight, over the chunks
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
