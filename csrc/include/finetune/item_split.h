// How sums over an item's rows are dealt out: to blocks whose number is a function of the shape alone, so that neither
// threads nor multiprocessors change a bit. The blocks' sums are rows of `partial` (blocks, items · dim).
#pragma once

#include "finetune/norm_split.h"

namespace finetune {

constexpr int64_t cpu_item_blocks(int64_t items, int64_t rows) {  // 32 in all, and at least four rows each
  const int64_t wanted = items < 32 ? 32 / (items ? items : 1) : 1, useful = (rows + 3) / 4;
  return useful < 1 ? 1 : wanted < useful ? wanted : useful;
}

constexpr NormSplit item_split(int64_t items, int64_t rows, int64_t dim) {
  NormSplit split(rows, dim);
  const int64_t most = items < NormSplit::kBlocks ? NormSplit::kBlocks / (items ? items : 1) : 1;
  if (split.blocks > most) split.blocks = most;
  return split;
}

// Of a grid: the z dimension, at most 65,535; a block takes the items that are gridDim.z apart.
constexpr unsigned grid_items(int64_t items) { return static_cast<unsigned>(items < 65535 ? items : 65535); }

// Floats of scratch for `sums` such sums.
constexpr int64_t item_scratch(bool device, int64_t items, int64_t rows, int64_t dim, int64_t sums) {
  const int64_t blocks = device ? item_split(items, rows, dim).blocks : cpu_item_blocks(items, rows);
  return sums * blocks * items * dim;
}

}  // namespace finetune
