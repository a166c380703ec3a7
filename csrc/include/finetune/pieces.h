// Many tensors in one call, as the ops on lists of gradients get them.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

// A run of elements of one tensor. On the CPU at most kPiece of them: the cut fixes the order of a sum, so that it does
// not depend on the number of threads, and one parallel loop covers large and small tensors alike. On CUDA a whole
// tensor, of which a block takes kPieceBlock elements.
struct Piece {
  void* data;
  int64_t size;
  DType dtype;
};
constexpr int64_t kPiece = 32768, kPieceBlock = 16384;

}  // namespace finetune
