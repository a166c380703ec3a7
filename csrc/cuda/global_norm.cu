// The L2 norm of many tensors together: the sum of squares of each block's elements, many tensors in one launch
// (tensor_list.cuh), then their join in order by one block, so the same bits at every call. No atomics, and the host
// waits for nothing.
//
// Memory: reads every element once; two FLOPs an element, half a FLOP a byte in fp32: the roof is memory bandwidth. A
// thread sums in fp32 (64 elements), the blocks are joined in double.
// Faults: block_sum.no_barrier join.half_the_sums join.no_barrier global_norm.no_root global_norm.first_blocks
//         global_norm.no_tail global_norm.absolute
#include "finetune/global_norm.h"
#include "join.cuh"
#include "tensor_list.cuh"
#include "vector.cuh"

namespace finetune {
namespace {

constexpr int kThreads = 256;
using List = TensorList<NormPiece, GlobalNormCuda::block>;

template <class T>
__global__ void __launch_bounds__(kThreads) squares(const __grid_constant__ List list, float* out) {
  const Slice at = slice(list);
  const T* x = static_cast<const T*>(list.pieces[at.piece].data) + at.begin;
  float sum = 0;
  for_each_group<kVector<T>>(BUG("global_norm.no_tail") ? at.size / 4 * 4 : at.size, are_aligned(x),
                             [&]<int N>(int64_t i) {
                               const auto v = load<T, N>(x + i);
#pragma unroll
                               for (int j = 0; j < N; ++j) {
                                 const float value = to_float(v.at[j]);
                                 sum += BUG("global_norm.absolute") ? fabsf(value) : value * value;
                               }
                             });
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kJoinThreads) join(const float* parts, int64_t count, float* norm) {
  const double sum = join_blocks(parts, count);
  if (threadIdx.x == 0) *norm = static_cast<float>(BUG("global_norm.no_root") ? sum : sqrt(sum));
}

}  // namespace

template <>
Status launch_cuda(const GlobalNormCuda& a, void* stream) {
  int64_t done = 0;
  for (const DType dtype : kFloats) {
    const Status status = for_each_list<GlobalNormCuda::block>(
        a.pieces, a.count, [=](const NormPiece& p) { return p.dtype == dtype; },
        [&](const List& list, unsigned blocks) {
          float* out = a.squares + (BUG("global_norm.first_blocks") ? 0 : done);
          done += blocks;
          return for_dtype(dtype, [&](auto t) {
            return launch(squares<decltype(t)>, dim3(blocks), dim3(kThreads), 0, stream, list, out);
          });
        });
    if (status != Status::ok) return status;
  }
  return launch(join, dim3(1), dim3(kJoinThreads), 0, stream, static_cast<const float*>(a.squares), done, a.norm);
}

}  // namespace finetune
