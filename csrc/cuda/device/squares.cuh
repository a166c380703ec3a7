// Σ x² of each block's elements, many tensors in one launch (tensor_list.cuh). A thread sums in fp32 (64 elements).
#pragma once

#include "tensor_list.cuh"
#include "vector.cuh"

namespace finetune {

constexpr int kSquaresThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSquaresThreads) squares(const __grid_constant__ PieceList list, float* out) {
  const Slice at = slice(list);
  const T* x = static_cast<const T*>(list.pieces[at.piece].data) + at.begin;
  float sum = 0;
  for_each_group<kVector<T>>(at.size, are_aligned(x), [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float value = to_float(v.at[j]);
      sum += value * value;
    }
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Into out (blocks,).
inline Status launch_squares(const Piece* pieces, int64_t count, float* out, void* stream) {
  return for_each_piece_list(pieces, count, [=](auto t, const PieceList& list, unsigned blocks, int64_t first) {
    return launch(squares<decltype(t)>, dim3(blocks), dim3(kSquaresThreads), 0, stream, list, out + first);
  });
}

}  // namespace finetune
