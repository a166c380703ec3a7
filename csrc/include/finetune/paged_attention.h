// Attention over a paged cache; the definition is finetune/ops/paged_attention.py.
#pragma once

#include "finetune/kv_cache.h"

namespace finetune {

struct PagedAttention {
  static constexpr int64_t piece = 256;  // tokens that are attended to alone; fixed, so that nothing else can matter

  DType dtype;  // of q and out
  Stored stored;
  const void* q;                     // (batch, queries, heads, dim), 1 between the elements of a head
  int64_t q_batch, q_query, q_head;  // strides
  KvPool k, v;                       // of one dtype
  const int32_t* table;              // (batch, width) block numbers
  const int32_t* lengths;            // (batch,) tokens of each sequence, the queries' included
  void* out;                         // (batch, queries, heads, dim)
  float* lse;                        // (batch, queries, heads) natural log-sum-exp of the visible scores
  float* sums;                       // (batch, queries, heads, pieces, dim), where there are several pieces:
                                     // Σ_j 2^(s_j − top) v_j over the piece, s_j = log2(e) · score of k_j
  float* tops;                       // (batch, queries, heads, pieces, 2): top = max s_j and Σ_j 2^(s_j − top)
  int64_t batch, queries, heads, kv_heads, dim, block_size, width, pieces;
  float scale;
  int64_t window;   // 0: none
  float softcap;    // c > 0: the score is c tanh(scale / c q·k); 0: scale q·k
  float* scratch;   // CPU: (workers, paged_attention_scratch()), 64-byte aligned
  int64_t workers;  // CPU: threads that may run at once; the result does not depend on it
};

// Floats of scratch a worker needs: q and o of the rows that share a kv head, their scores, a tile of keys or values.
constexpr int64_t kPagedTile = 64;
constexpr int64_t paged_attention_scratch(int64_t rows, int64_t dim) {
  return rows * (2 * (dim + 32) + PagedAttention::piece + 32 + 2) + kPagedTile * (dim + 32) + 96;
}

// The tokens [first, last) that query i of a sequence sees.
struct Seen {
  int64_t first, last;
};
#if defined(__CUDACC__)
__host__ __device__
#endif
    inline Seen seen_by(const PagedAttention& a, int64_t b, int64_t i) {
  const int64_t most = a.width * a.block_size, length = a.lengths[b] < most ? a.lengths[b] : most;
  const int64_t last = length - a.queries + i + 1, first = a.window ? last - a.window : 0;
  return {first > 0 ? first : 0, last > 0 ? last : 0};
}

}  // namespace finetune
