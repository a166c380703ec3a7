// The pieces of many tensors.
#pragma once

#include <numeric>

#include "common.h"
#include "finetune/pieces.h"

namespace finetune {

struct Pieces {
  std::vector<Piece> pieces;
  int64_t blocks = 0;  // of kPieceBlock elements, on CUDA
  const Piece* data() const { return pieces.data(); }
  int64_t count() const { return static_cast<int64_t>(pieces.size()); }
};

// Of contiguous tensors. written: the kernel changes them.
inline Pieces cut(const std::vector<Tensor>& tensors, const char* op, bool written) {
  Pieces out;
  for (const Tensor& tensor : tensors) {
    check(tensor.is_contiguous(), op, "tensors must be contiguous");
    const DType dtype = dtype_of(tensor, true);
    char* data = static_cast<char*>(written ? inout(tensor) : const_cast<void*>(in(tensor)));
    const int64_t size = tensor.numel(), most = on_device(tensor) ? size : kPiece;
    for (int64_t at = 0; at < size; at += most) {
      out.pieces.push_back({data + at * bytes_of(dtype), std::min(most, size - at), dtype});
    }
    out.blocks += (size + kPieceBlock - 1) / kPieceBlock;
  }
  return out;
}

inline double sum(const std::vector<double>& squares) { return std::accumulate(squares.begin(), squares.end(), 0.0); }

}  // namespace finetune
