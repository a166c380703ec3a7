// A block adds its 256 elements in shared memory as a tree: one atomic a block instead of one a thread.
//
// Step s adds element 2·s·t + s to element 2·s·t. The distance between the lanes' addresses doubles with every step: 2,
// 4, … words, and a distance of 32 words is one bank for all lanes. Half the lanes of every warp work less and less.
// (Harris 2007, Optimizing parallel reduction in CUDA, kernel 2.)
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
  for (int step = 1; step < BLOCK_SIZE; step *= 2) {
    const int at = 2 * step * t;
    if (at < BLOCK_SIZE) part[at] += part[at + step];
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
