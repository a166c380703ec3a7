// The L2 norm of many tensors together: the sum of squares of each block's elements (squares.cuh), then their join in
// order by one block, so the same bits at every call. No atomics, and the host waits for nothing.
//
// Memory: reads every element once; two FLOPs an element, half a FLOP a byte in fp32: the roof is memory bandwidth. A
// thread sums in fp32, the blocks are joined in double.
#include "finetune/global_norm.h"

#include "device/join.cuh"
#include "device/squares.cuh"

namespace finetune {
namespace {

__global__ void __launch_bounds__(kJoinThreads) join(const float* parts, int64_t count, float* norm) {
  const double sum = join_blocks(parts, count);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

}  // namespace

template <>
Status launch_cuda(const GlobalNormCuda& a, void* stream) {
  const Status status = launch_squares(a.pieces, a.count, a.squares, stream);
  if (status != Status::ok) return status;
  return launch(join, dim3(1), dim3(kJoinThreads), 0, stream, static_cast<const float*>(a.squares), a.blocks, a.norm);
}

}  // namespace finetune
