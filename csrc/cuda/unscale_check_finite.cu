// Gradients unscaled, checked and measured in one pass: g ← g · inverse in place, and of each block's elements the sum
// of squares and whether one was not finite, many tensors in one launch (tensor_list.cuh); then one block joins these
// in order, so the same bits at every call. The inverse scale is read from device memory and the answers stay there.
//
// Memory: reads and writes every element once, 8 bytes in fp32; about five operations an element: the roof is memory
// bandwidth. A thread sums in fp32 (64 elements), the blocks are joined in double.
#include "finetune/unscale_check_finite.h"

#include "device/join.cuh"
#include "device/tensor_list.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 256;

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE)
    unscale(const __grid_constant__ PieceList list, const float* by, float* squares, float* overflow) {
  const Slice at = slice(list);
  T* grad = static_cast<T*>(list.pieces[at.piece].data) + at.begin;
  const float inverse = *by;
  float sum = 0;
  bool bad = false;
  for_each_group<kVector<T>>(at.size, are_aligned(grad), [&]<int N>(int64_t i) {
    auto v = load<T, N>(grad + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float g = to_float(v.at[j]), out = g * inverse;
      bad |= !(fabsf(g) <= 3.402823466e38f);
      sum += out * out;
      v.at[j] = from_float<T>(out);
    }
    store(grad + i, v);
  });
  sum = block_sum(sum);
  const float any = block_sum(bad ? 1.0f : 0.0f);
  if (threadIdx.x == 0) {
    squares[blockIdx.x] = sum;
    overflow[blockIdx.x] = any > 0 ? 1.0f : 0.0f;
  }
}

__global__ void __launch_bounds__(kJoinThreads)
    join(const float* squares, const float* overflow, int64_t count, float* square, float* found_inf) {
  const double sum = join_blocks(squares, count);
  __syncthreads();  // all have read it
  const double bad = join_blocks(overflow, count);
  if (threadIdx.x == 0) {
    *square = static_cast<float>(sum);
    *found_inf = bad > 0 ? 1.0f : 0.0f;
  }
}

}  // namespace

template <>
Status launch_cuda(const UnscaleCheckFiniteCuda& a, void* stream) {
  const auto step = [&](auto t, const PieceList& list, unsigned blocks, int64_t first) {
    return launch(unscale<decltype(t)>, dim3(blocks), dim3(BLOCK_SIZE), 0, stream, list, a.inverse, a.squares + first,
                  a.overflow + first);
  };
  const Status status = for_each_piece_list(a.pieces, a.count, step);
  if (status != Status::ok) return status;
  return launch(join, dim3(1), dim3(kJoinThreads), 0, stream, static_cast<const float*>(a.squares),
                static_cast<const float*>(a.overflow), a.blocks, a.square, a.found_inf);
}

}  // namespace finetune
