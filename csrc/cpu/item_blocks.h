// How modulate and gate_residual go over the rows of items (item_split.h), so that no bit depends on the thread count.
#pragma once

#include "finetune/item_split.h"
#include "simd.h"

namespace finetune::FINETUNE_LEVEL {

// body(item, block of its rows, first row of all items, behind the last) for each block, in parallel.
template <class Body>
void for_each_item_block(int64_t items, int64_t rows, int64_t dim, Body&& body) {
  const int64_t blocks = cpu_item_blocks(items, rows), per = (rows + blocks - 1) / blocks;
  parallel_for(items * blocks, 1 + 8192 / (per * dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t item = task / blocks, block = task % blocks;
      const int64_t first = block * per < rows ? block * per : rows, last = first + per < rows ? first + per : rows;
      body(item, block, item * rows + first, item * rows + last);
    }
  });
}

// out (items, dim) = the sum of partial's blocks (blocks, items, dim), in order.
template <class T>
void sum_item_blocks(int64_t items, int64_t rows, int64_t dim, const float* partial, T* out) {
  const int64_t blocks = cpu_item_blocks(items, rows), all = items * dim;
  for_each_vector(all, [&](int64_t i, auto get, auto put) {
    vf total{};
    for (int64_t block = 0; block < blocks; ++block) total += get(partial + block * all + i);
    put(out + i, total);
  });
}

}  // namespace finetune::FINETUNE_LEVEL
