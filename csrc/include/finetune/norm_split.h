// How the CUDA norms' backward passes deal out rows and columns. A function of the shape alone, never of the number of
// multiprocessors: the order of the sums over rows is part of the result, which has the same bits on every GPU.
#pragma once

#include <cstdint>

namespace finetune {

struct NormSplit {
  static constexpr int kOwned = 8;      // columns of a thread, in every row: what is summed over rows stays there
  static constexpr int kThreads = 256;  // of a block whose rows are short
  static constexpr int kWidest = 4096;  // columns that one block takes: 512 threads
  // Blocks: 3.6 for each multiprocessor of an A100 (108), 2.9 of an H100 (132), 2.6 of a B200 (148).
  static constexpr int64_t kBlocks = 384;

  int lanes;       // threads that share a row: a power of two up to 32, or whole warps
  int teams;       // rows that a block takes at once
  int64_t blocks;  // the rows are cut into so many runs
  int64_t tiles;   // and the columns into so many; 1 up to kWidest

  constexpr NormSplit(int64_t rows, int64_t dim) {
    const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    tiles = dim <= kWidest ? 1 : up(dim, kThreads * kOwned);
    const int wanted = tiles == 1 ? static_cast<int>(up(dim, kOwned)) : kThreads;
    for (lanes = 1; lanes < wanted && lanes < 32;) lanes *= 2;
    if (wanted > 32) lanes = (wanted + 31) / 32 * 32;
    teams = lanes < kThreads ? kThreads / lanes : 1;
    const int64_t most = tiles < kBlocks ? kBlocks / tiles : 1, useful = up(rows, 2 * teams);  // two steps a block
    blocks = useful < most ? useful : most;
  }

  // Floats of scratch: `sums` rows of (blocks, dim) for what is summed over rows, and where a row has several tiles
  // `means` numbers a row.
  constexpr int64_t scratch(int64_t rows, int64_t dim, int64_t sums, int64_t means) const {
    return sums * blocks * dim + (tiles > 1 ? means * rows : 0);
  }
};

}  // namespace finetune
