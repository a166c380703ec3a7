// The sum of x (rows, columns) over columns, fp32 → (rows): one block of 256 threads a row, any number of columns.
//
// Each thread adds a part of the row, then the 256 partial sums are added in shared memory as a tree, without bank
// conflicts, or by warp shuffles. No atomics.
#include "device/launch.cuh"

namespace finetune {
namespace {

__global__ void __launch_bounds__(256) row_sum(const float* x, float* sum, int64_t columns) {
  SHARED(float, part, [256]);
  const float* row = x + blockIdx.x * columns;
  const int t = threadIdx.x;
  // write this
  float own = 0.0f;
  for (int64_t i = t; i < columns; i += 256) own += row[i];
  part[t] = own;
  __syncthreads();
  for (int step = 128; step > 0; step /= 2) {
    if (t < step) part[t] += part[t + step];
    __syncthreads();
  }
  if (t == 0) sum[blockIdx.x] = part[0];
  // written
}

}  // namespace
}  // namespace finetune

extern "C" int launch(const float* x, float* sum, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  return static_cast<int>(launch(row_sum, dim3(static_cast<unsigned>(rows)), dim3(256), 0, stream, x, sum, columns));
}
