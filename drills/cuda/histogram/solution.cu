// Counts of n numbers of type int32, each from 0 to 255 → 256 counts in int32.
//
// A block of 256 threads counts its part of the numbers in shared memory, then adds its 256 counts to the result: at most
// 256 atomics of global memory a block. The result is set to 0 before the kernel runs.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int BINS = 256;

__global__ void clear(int* counts) { counts[threadIdx.x] = 0; }

__global__ void __launch_bounds__(BINS) histogram(const int* x, int* counts, int64_t n) {
  SHARED(int, own, [BINS]);
  const int t = threadIdx.x;
  // write this
  own[t] = 0;
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * BINS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * BINS + t; i < n; i += step) atomicAdd(&own[x[i]], 1);
  __syncthreads();
  atomicAdd(&counts[t], own[t]);
  // written
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const int* x, int* counts, int64_t n, void* stream) {
  using namespace finetune;
  const Status status = launch(clear, dim3(1), dim3(BINS), 0, stream, counts);
  if (status != Status::ok) return static_cast<int>(status);
  return static_cast<int>(launch(histogram, dim3(3), dim3(BINS), 0, stream, x, counts, n));
}
