// The L2 norm of many tensors together, all of them in one parallel loop: Σ x² of each piece, which the caller adds up.
//
// Memory: reads every element once; two FLOPs an element: memory bandwidth is the roof.
#include "finetune/global_norm.h"

#include "formats.h"
#include "squares.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

template <class T>
double squares(const NormPiece& piece) {
  return sum_squares_of(static_cast<const T*>(piece.data), piece.size);
}

Status global_norm(const GlobalNorm& a) {
  parallel_for(a.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const NormPiece& piece = a.pieces[at];
      a.squares[at] = piece.dtype == DType::f32    ? squares<float>(piece)
                      : piece.dtype == DType::bf16 ? squares<bf16>(piece)
                                                   : squares<f16>(piece);
    }
  });
  return Status::ok;
}

FINETUNE_REGISTER(GlobalNorm, global_norm);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
