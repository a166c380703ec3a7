// Clipping by the global norm (Pascanu et al. 2013, arXiv:1211.5063): norm = sqrt(Σ g²), g ← g · min(1, max / norm).
// Three steps, and no host between them: the sum of squares of each block's elements (squares.cuh), their join in order
// by one block (so the same bits at every call), the scaling, which reads the scale where the join wrote it.
//
// Memory: the norm reads every element once; the scaling reads and writes it once, and nothing if nothing is clipped: 4
// and 8 bytes an element in fp32. Two FLOPs and one an element: the roof is memory bandwidth.
#include "finetune/clip_grad_norm.h"

#include "device/join.cuh"
#include "device/squares.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 256;

__global__ void __launch_bounds__(kJoinThreads)
    join(const float* parts, int64_t count, double max_norm, float* norm, float* scale) {
  const double root = sqrt(join_blocks(parts, count)), by = max_norm / (root + 1e-6);
  if (threadIdx.x) return;
  *norm = static_cast<float>(root);
  // Not by < 1: a NaN norm makes every gradient NaN, as in torch.
  *scale = static_cast<float>(by >= 1 ? 1 : by);
}

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) multiply(const __grid_constant__ PieceList list, const float* scale) {
  const float by = *scale;
  if (by == 1) return;
  const Slice at = slice(list);
  T* grad = static_cast<T*>(list.pieces[at.piece].data) + at.begin;
  for_each_group<kVector<T>>(at.size, are_aligned(grad), [&]<int N>(int64_t i) {
    auto v = load<T, N>(grad + i);
#pragma unroll
    for (int j = 0; j < N; ++j) v.at[j] = from_float<T>(to_float(v.at[j]) * by);
    store(grad + i, v);
  });
}

}  // namespace

template <>
Status launch_cuda(const ClipGradNormCuda& a, void* stream) {
  Status status = launch_squares(a.pieces, a.count, a.squares, stream);
  if (status != Status::ok) return status;
  status = launch(join, dim3(1), dim3(kJoinThreads), 0, stream, static_cast<const float*>(a.squares), a.blocks,
                  a.max_norm, a.norm, a.scale);
  if (status != Status::ok) return status;
  return for_each_piece_list(a.pieces, a.count, [&](auto t, const PieceList& list, unsigned blocks, int64_t) {
    return launch(multiply<decltype(t)>, dim3(blocks), dim3(BLOCK_SIZE), 0, stream, list,
                  static_cast<const float*>(a.scale));
  });
}

}  // namespace finetune
