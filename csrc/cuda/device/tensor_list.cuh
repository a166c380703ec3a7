// Many tensors in one launch. Their table travels by value among the kernel's parameters (4 KB at most), so nothing is
// copied to the device first and nobody waits. What does not fit goes with a further launch. A block takes `kElements`
// elements of one tensor; `first` says which blocks are whose.
//
// A CUDA graph replays what a launch had by value. For global_norm, clip_grad_norm and unscale_check_finite those are
// addresses and a constant bound, and everything that changes from step to step is in device memory: they may be
// captured if their tensors stay where they are. adamw and adamw8bit have the learning rate, the decay and the bias
// corrections by value: a replay would repeat the captured step's, so ops refuses them in a capture (_lists.py).
#pragma once

#include "finetune/pieces.h"
#include "launch.cuh"

namespace finetune {

template <class Piece, int kElements>
struct TensorList {
  static constexpr int most = (4096 - 256) / (sizeof(Piece) + sizeof(unsigned));
  static constexpr int elements = kElements;
  Piece pieces[most];
  unsigned first[most + 1];  // piece i has the blocks [first[i], first[i + 1])
  int count;
};

// What this block works on: elements [begin, begin + size) of pieces[piece].
struct Slice {
  int piece;
  int64_t begin, size;
};

template <class List>
__device__ __forceinline__ Slice slice(const List& list) {
  int low = 0, high = list.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    list.first[middle] <= blockIdx.x ? low = middle : high = middle - 1;
  }
  const int64_t begin = static_cast<int64_t>(blockIdx.x - list.first[low]) * List::elements;
  const int64_t rest = list.pieces[low].size - begin;
  return {low, begin, rest < List::elements ? rest : List::elements};
}

// Calls f(list, blocks) for as many lists as the pieces that `keep` accepts fill.
template <int kElements, class Piece, class Keep, class F>
Status for_each_list(const Piece* pieces, int64_t count, Keep&& keep, F&& f) {
  TensorList<Piece, kElements> list{};
  for (int64_t i = 0; i <= count; ++i) {
    if (list.count == list.most || (i == count && list.count)) {
      const unsigned blocks = list.first[list.count];
      const Status status = f(list, blocks);
      if (status != Status::ok) return status;
      list.count = 0;
    }
    if (i < count && pieces[i].size && keep(pieces[i])) {
      list.pieces[list.count] = pieces[i];
      list.first[list.count + 1] = list.first[list.count] + static_cast<unsigned>(ceil_div(pieces[i].size, kElements));
      ++list.count;
    }
  }
  return Status::ok;
}

// Calls f(element, list, blocks, first) for the lists of each dtype; `first` is the number of blocks before the list.
using PieceList = TensorList<Piece, kPieceBlock>;
template <class F>
Status for_each_piece_list(const Piece* pieces, int64_t count, F&& f) {
  int64_t done = 0;
  for (const DType dtype : kFloats) {
    const auto alike = [=](const Piece& p) { return p.dtype == dtype; };
    const Status status = for_each_list<kPieceBlock>(pieces, count, alike, [&](const PieceList& list, unsigned blocks) {
      const int64_t first = done;
      done += blocks;
      return for_dtype(dtype, [&](auto element) { return f(element, list, blocks, first); });
    });
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

// Calls f(parameter, gradient, list, blocks) for the lists of each pair of dtypes.
template <int kElements, class Args, class F>
Status for_each_adamw_list(const Args& a, F&& f) {
  for (const DType param : kFloats) {
    for (const DType grad : kFloats) {
      const auto alike = [=](const auto& p) { return p.param_dtype == param && p.grad_dtype == grad; };
      const Status status = for_each_list<kElements>(a.pieces, a.count, alike, [&](const auto& list, unsigned blocks) {
        return for_dtype(param, [&](auto p) { return for_dtype(grad, [&](auto g) { return f(p, g, list, blocks); }); });
      });
      if (status != Status::ok) return status;
    }
  }
  return Status::ok;
}

}  // namespace finetune
