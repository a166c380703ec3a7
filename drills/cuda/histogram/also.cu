#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int BINS = 256;

__global__ void clear(int* counts) { counts[threadIdx.x] = 0; }

__global__ void __launch_bounds__(BINS) histogram(const int* x, int* counts, int64_t n) {
  SHARED(int, own, [BINS]);
  for (int i = threadIdx.x; i < BINS; i += blockDim.x) own[i] = 0;
  __syncthreads();
  const int64_t share = ceil_div(n, gridDim.x), from = blockIdx.x * share, to = from + share < n ? from + share : n;
  for (int64_t i = from + threadIdx.x; i < to; i += blockDim.x) atomicAdd(own + x[i], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < BINS; i += blockDim.x) {
    if (own[i] != 0) atomicAdd(counts + i, own[i]);
  }
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const int* x, int* counts, int64_t n, void* stream) {
  using namespace finetune;
  const Status status = launch(clear, dim3(1), dim3(BINS), 0, stream, counts);
  if (status != Status::ok) return static_cast<int>(status);
  return static_cast<int>(launch(histogram, dim3(3), dim3(BINS), 0, stream, x, counts, n));
}
