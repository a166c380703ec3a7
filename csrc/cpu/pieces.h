// The pieces of many tensors in one parallel loop.
#pragma once

#include "finetune/pieces.h"
#include "formats.h"

namespace finetune::FINETUNE_LEVEL {

// f(i, elements, size) for each piece i, in its element type.
template <class F>
Status for_each_piece(const Piece* pieces, int64_t count, F&& f) {
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      switch (piece.dtype) {
        case DType::f32:
          f(i, static_cast<float*>(piece.data), piece.size);
          break;
        case DType::bf16:
          f(i, static_cast<bf16*>(piece.data), piece.size);
          break;
        case DType::f16:
          f(i, static_cast<f16*>(piece.data), piece.size);
          break;
        case DType::f64:  // the binding lets none through
          break;
      }
    }
  });
  return Status::ok;
}

}  // namespace finetune::FINETUNE_LEVEL
