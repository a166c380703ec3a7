// The same tree the other way round: the upper half is added to the lower, so the lanes read neighboring words.
//
// Step s (128, 64, … 1) adds element t + s to element t: no bank is asked twice, and the threads that still work are
// the first ones, so whole warps are done early instead of half of every warp. (Harris 2007, kernel 3.)
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 256;

__global__ void clear(float* sum) { *sum = 0.0f; }

__global__ void __launch_bounds__(BLOCK_SIZE) add_all(const float* x, float* sum, int64_t n) {
  SHARED(float, part, [BLOCK_SIZE]);
  const int t = threadIdx.x;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK_SIZE + t;
  part[t] = i < n ? x[i] : 0.0f;
  __syncthreads();
  for (int step = BLOCK_SIZE / 2; step; step /= 2) {
    if (t < step) part[t] += part[t + step];
    __syncthreads();
  }
  if (t == 0) atomicAdd(sum, part[0]);
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const float* x, float* /*partial*/, float* sum, int64_t n, void* stream) {
  using namespace finetune;
  const Status status = launch(clear, dim3(1), dim3(1), 0, stream, sum);
  if (status != Status::ok) return static_cast<int>(status);
  const dim3 grid(static_cast<unsigned>(ceil_div(n, BLOCK_SIZE)));
  return static_cast<int>(launch(add_all, grid, dim3(BLOCK_SIZE), 0, stream, x, sum, n));
}
