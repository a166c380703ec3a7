// The last step of a sum over many blocks: one block adds what they left, in order, in double precision.
#pragma once

#include "launch.cuh"

namespace finetune {

constexpr int kJoinThreads = 256;

// The sum, in every thread of a block of kJoinThreads.
__device__ __forceinline__ double join_blocks(const float* parts, int64_t count) {
  SHARED(double, sums, [kJoinThreads]);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kJoinThreads) sum += parts[i];
  sums[threadIdx.x] = sum;
  for (unsigned width = kJoinThreads / 2; width; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
  }
  __syncthreads();
  return sums[0];
}

}  // namespace finetune
