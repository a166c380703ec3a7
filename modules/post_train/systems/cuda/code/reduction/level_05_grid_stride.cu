// A fixed grid walks over the array in 16-byte loads; a second kernel adds the blocks' sums in order, without atomics.
//
// A thread adds many elements in a register before it talks to anyone, so exchanges and barriers are paid once a block
// and not once for 256 elements. The sum no longer depends on the order in which blocks finish: the same bits every
// time.
#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 256, kMostBlocks = 1024, kWide = 4;  // partial has kMostBlocks elements

__global__ void __launch_bounds__(BLOCK_SIZE) add_part(const float* x, float* partial, int64_t n) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * BLOCK_SIZE + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * BLOCK_SIZE, groups = are_aligned(x) ? n / kWide : 0;
  float v = 0.0f;
  for (int64_t i = thread; i < groups; i += threads) {
    const auto four = load<float, kWide>(x + i * kWide);
    v += (four.at[0] + four.at[1]) + (four.at[2] + four.at[3]);
  }
  for (int64_t i = groups * kWide + thread; i < n; i += threads) v += x[i];
  v = block_sum(v);
  if (threadIdx.x == 0) partial[blockIdx.x] = v;
}

__global__ void __launch_bounds__(BLOCK_SIZE) join(const float* partial, int blocks, float* sum) {
  float v = 0.0f;
  for (int i = threadIdx.x; i < blocks; i += BLOCK_SIZE) v += partial[i];
  v = block_sum(v);
  if (threadIdx.x == 0) *sum = v;
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const float* x, float* partial, float* sum, int64_t n, void* stream) {
  using namespace finetune;
  const int64_t wanted = ceil_div(n, 8 * kWide * BLOCK_SIZE);  // eight loads a thread
  const int blocks = static_cast<int>(wanted < kMostBlocks ? wanted : kMostBlocks);
  const Status status = launch(add_part, dim3(blocks), dim3(BLOCK_SIZE), 0, stream, x, partial, n);
  if (status != Status::ok) return static_cast<int>(status);
  return static_cast<int>(launch(join, dim3(1), dim3(BLOCK_SIZE), 0, stream, partial, blocks, sum));
}
