// Three kernels and a matrix of all scores in global memory: what the formula says.
//
// S = Q·Kᵀ / √D, P = softmax(S) by rows, O = P·V; q (H, M, D), k and v (H, N, D) bf16, out (H, M, D) fp32. 4·H·M·N·D
// FLOPs. `scores` (H, M, N) fp32 is written, read three times and written by the softmax, and read again: for long
// sequences nearly all of the traffic, and memory that grows with the square of the length.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int kThreads = 128;

struct Shape {
  int64_t heads, q_len, k_len, dim;
};

__device__ __forceinline__ int64_t my_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

__global__ void __launch_bounds__(kThreads) multiply(const bf16* q, const bf16* k, float* scores, Shape s) {
  const int64_t i = my_index(), row = i / s.k_len, head = row / s.q_len;  // row counts through all heads
  if (i >= s.heads * s.q_len * s.k_len) return;
  const bf16 *mine = q + row * s.dim, *key = k + (head * s.k_len + i % s.k_len) * s.dim;
  float sum = 0.0f;
  for (int64_t d = 0; d < s.dim; ++d) sum += to_float(mine[d]) * to_float(key[d]);
  scores[i] = sum * rsqrtf(static_cast<float>(s.dim));
}

__global__ void __launch_bounds__(kThreads) softmax(float* scores, Shape s) {
  const int64_t row = my_index();
  if (row >= s.heads * s.q_len) return;
  float *mine = scores + row * s.k_len, most = -INFINITY, sum = 0.0f;
  for (int64_t i = 0; i < s.k_len; ++i) most = fmaxf(most, mine[i]);
  for (int64_t i = 0; i < s.k_len; ++i) sum += __expf(mine[i] - most);
  for (int64_t i = 0; i < s.k_len; ++i) mine[i] = __expf(mine[i] - most) / sum;
}

__global__ void __launch_bounds__(kThreads) weigh(const float* scores, const bf16* v, float* out, Shape s) {
  const int64_t i = my_index(), row = i / s.dim, d = i % s.dim, head = row / s.q_len;
  if (i >= s.heads * s.q_len * s.dim) return;
  float sum = 0.0f;
  for (int64_t j = 0; j < s.k_len; ++j)
    sum += scores[row * s.k_len + j] * to_float(v[(head * s.k_len + j) * s.dim + d]);
  out[i] = sum;
}

dim3 blocks(int64_t threads) { return dim3(static_cast<unsigned>(ceil_div(threads, kThreads))); }

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const void* q, const void* k, const void* v, float* out, float* scores, int64_t heads,
                            int64_t q_len, int64_t k_len, int64_t dim, void* stream) {
  using namespace finetune;
  const Shape s{heads, q_len, k_len, dim};
  const auto *queries = static_cast<const bf16*>(q), *keys = static_cast<const bf16*>(k);
  Status status = launch(multiply, blocks(heads * q_len * k_len), dim3(kThreads), 0, stream, queries, keys, scores, s);
  if (status == Status::ok) status = launch(softmax, blocks(heads * q_len), dim3(kThreads), 0, stream, scores, s);
  if (status != Status::ok) return static_cast<int>(status);
  return static_cast<int>(launch(weigh, blocks(heads * q_len * dim), dim3(kThreads), 0, stream, scores,
                                 static_cast<const bf16*>(v), out, s));
}
