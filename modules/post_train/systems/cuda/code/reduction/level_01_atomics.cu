// Every thread adds its element to the result with an atomic: all of them queue for one address.
//
// sum = Σ x[i]; x (n,) fp32. The hardware serializes atomics on one address, and their order changes from run to run,
// so that a floating sum is not reproducible. `partial` (1024,) is scratch of the later levels.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 256;

__global__ void clear(float* sum) { *sum = 0.0f; }

__global__ void __launch_bounds__(BLOCK_SIZE) add_all(const float* x, float* sum, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK_SIZE + threadIdx.x;
  if (i >= n) return;
  atomicAdd(sum, x[i]);
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
