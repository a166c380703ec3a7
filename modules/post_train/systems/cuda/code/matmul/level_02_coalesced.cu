// The same with x and y exchanged: neighboring threads take neighboring columns.
//
// Now the lanes of a warp read one element of A (the same address for 16 of them: one sector) and neighboring elements
// of B, and write neighboring elements of C. Nothing else has changed.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int kSide = 16;  // a block computes kSide × kSide elements

__global__ void __launch_bounds__(kSide* kSide)
    matmul(const bf16* a, const bf16* b, float* c, int64_t m, int64_t n, int64_t k) {
  const int64_t tiles = ceil_div(n, kSide);
  const int64_t row = blockIdx.x / tiles * kSide + threadIdx.y, column = blockIdx.x % tiles * kSide + threadIdx.x;
  if (row >= m || column >= n) return;
  float sum = 0.0f;
  for (int64_t i = 0; i < k; ++i) sum += to_float(a[row * k + i]) * to_float(b[i * n + column]);
  c[row * n + column] = sum;
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(m, kSide) * ceil_div(n, kSide)));
  return static_cast<int>(launch(matmul, grid, dim3(kSide, kSide), 0, stream, static_cast<const bf16*>(a),
                                 static_cast<const bf16*>(b), c, m, n, k));
}
