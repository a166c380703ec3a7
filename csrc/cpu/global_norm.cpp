// The L2 norm of many tensors together, all of them in one parallel loop: Σ x² of each piece, which the caller adds up.
//
// Memory: reads every element once; two FLOPs an element: memory bandwidth is the roof.
#include "finetune/global_norm.h"

#include "pieces.h"
#include "squares.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

Status global_norm(const GlobalNorm& a) {
  return for_each_piece(a.pieces, a.count,
                        [&](int64_t i, const auto* x, int64_t size) { a.squares[i] = sum_squares_of(x, size); });
}

FINETUNE_REGISTER(GlobalNorm, global_norm);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
