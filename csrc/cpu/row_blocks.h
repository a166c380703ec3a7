// How kernels go over rows: in pairs or tiles that share what they load, and the norms so that no bit depends on the thread count. Sums over rows: the rows are cut into a fixed
// number of blocks, each block adds into its own fp32 row of `partial`, and those rows are added in order.
#pragma once

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {

constexpr int64_t kRowBlocks = 32;  // also the Backward structs' `blocks`

FINETUNE_INLINE int64_t rows_per_block(int64_t rows) { return (rows + kRowBlocks - 1) / kRowBlocks; }

// body.template operator()<n>(row) for rows [begin, end): n = 2 rows at a time, whose sums need not wait for one
// another and which share the loads of the weights, then n = 1 for what is left. Which rows pair up depends on begin
// alone. kPairs = false takes all one by one.
template <bool kPairs, class Body>
FINETUNE_INLINE void in_pairs(int64_t begin, int64_t end, Body&& body) {
  int64_t row = begin;
  if constexpr (kPairs) {
    for (; row + 2 <= end; row += 2) body.template operator()<2>(row);
  }
  for (; row < end; ++row) body.template operator()<1>(row);
}

// body.template operator()<n>(row) over rows [0, m), n = kMost at a time, then all that are left.
template <int kMost, class Body>
FINETUNE_INLINE void last_tile(int64_t row, int64_t left, Body&& body) {
  if constexpr (kMost > 0) {
    if (left == kMost) return body.template operator()<kMost>(row);
    last_tile<kMost - 1>(row, left, body);
  }
}
template <int kMost, class Body>
FINETUNE_INLINE void in_tiles(int64_t m, Body&& body) {
  int64_t row = 0;
  for (; row + kMost <= m; row += kMost) body.template operator()<kMost>(row);
  last_tile<kMost - 1>(row, m - row, body);
}

// In the backward passes pairs gain 15 % with bf16, whose conversions cost most, and lose up to 40 % with fp32 rows
// from L3 (Zen 3): there the traffic costs most and twice the streams go slower.
template <class T>
constexpr bool kBackwardPairs = sizeof(T) == 2;

// body.template operator()<n>(row) over all rows in pairs, in parallel.
template <class Body>
void for_each_pair(int64_t rows, int64_t dim, Body&& body) {
  parallel_for((rows + 1) / 2, 1 + 8192 / (dim + 1),
               [&](int64_t begin, int64_t end) { in_pairs<true>(2 * begin, 2 * end < rows ? 2 * end : rows, body); });
}

// body(block, first_row, last_row) for each block that has rows.
template <class Body>
void for_each_row_block(int64_t rows, int64_t dim, Body&& body) {
  if (!rows) return;
  const int64_t per = rows_per_block(rows), used = (rows + per - 1) / per;
  parallel_for(used, 1 + 8192 / (per * dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = (block + 1) * per;
      body(block, block * per, last < rows ? last : rows);
    }
  });
}

// out = the sum of partial's rows (blocks, dim), one a block that has rows; zero if there are none.
template <class T>
void sum_blocks(int64_t rows, int64_t dim, const float* partial, T* out) {
  const int64_t per = rows_per_block(rows), used = rows ? (rows + per - 1) / per : 0;
  for_each_vector(dim, [&](int64_t i, auto get, auto put) {
    vf total{};
    for (int64_t block = 0; block < used; ++block) total += get(partial + block * dim + i);
    put(out + i, total);
  });
}

}  // namespace finetune::FINETUNE_LEVEL
