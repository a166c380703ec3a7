// Sums over rows that do not depend on the thread count: the rows are cut into a fixed number of blocks, each block
// adds into its own fp32 row of `partial`, and those rows are added in order.
#pragma once

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {

constexpr int64_t kRowBlocks = 32;  // also the Backward structs' `blocks`

FINETUNE_INLINE int64_t rows_per_block(int64_t rows) { return (rows + kRowBlocks - 1) / kRowBlocks; }

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
