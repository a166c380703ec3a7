// Three kernels and a matrix of all scores in global memory: what the formula says.
//
// S = Q·Kᵀ / √D, P = softmax(S) by rows, O = P·V; q (H, M, D), k and v (H, N, D) bf16, out (H, M, D) fp32. 4·H·M·N·D
// FLOPs. `scores` (H, M, N) fp32 is written, read three times and written by the softmax, and read again: for long
// sequences nearly all of the traffic, and memory that grows with the square of the length.
#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 128;

struct Shape {
  int64_t heads, q_len, k_len, dim;
};

__device__ __forceinline__ int64_t my_index() { return static_cast<int64_t>(blockIdx.x) * BLOCK_SIZE + threadIdx.x; }

// A thread computes one score.
__global__ void __launch_bounds__(BLOCK_SIZE) multiply_qk(const bf16* q, const bf16* k, float* scores, Shape s) {
  const int64_t i = my_index(), row = i / s.k_len, head = row / s.q_len;  // row counts through all heads
  if (i >= s.heads * s.q_len * s.k_len) return;
  const bf16 *query = q + row * s.dim, *key = k + (head * s.k_len + i % s.k_len) * s.dim;
  float sum = 0.0f;
  for (int64_t d = 0; d < s.dim; ++d) sum += to_float(query[d]) * to_float(key[d]);
  scores[i] = sum * rsqrtf(static_cast<float>(s.dim));
}

// A thread takes one row.
__global__ void __launch_bounds__(BLOCK_SIZE) softmax(float* scores, Shape s) {
  const int64_t row = my_index();
  if (row >= s.heads * s.q_len) return;
  float *x = scores + row * s.k_len, m = -INFINITY, l = 0.0f;
  for (int64_t j = 0; j < s.k_len; ++j) m = fmaxf(m, x[j]);
  for (int64_t j = 0; j < s.k_len; ++j) l += __expf(x[j] - m);
  for (int64_t j = 0; j < s.k_len; ++j) x[j] = __expf(x[j] - m) / l;
}

// A thread computes one element of the output.
__global__ void __launch_bounds__(BLOCK_SIZE) multiply_pv(const float* p, const bf16* v, float* out, Shape s) {
  const int64_t i = my_index(), row = i / s.dim, d = i % s.dim, head = row / s.q_len;
  if (i >= s.heads * s.q_len * s.dim) return;
  float sum = 0.0f;
  for (int64_t j = 0; j < s.k_len; ++j) sum += p[row * s.k_len + j] * to_float(v[(head * s.k_len + j) * s.dim + d]);
  out[i] = sum;
}

dim3 blocks(int64_t threads) { return dim3(static_cast<unsigned>(ceil_div(threads, BLOCK_SIZE))); }

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const void* q, const void* k, const void* v, float* out, float* scores, int64_t heads,
                            int64_t q_len, int64_t k_len, int64_t dim, void* stream) {
  using namespace finetune;
  const Shape s{heads, q_len, k_len, dim};
  Status status = launch(multiply_qk, blocks(heads * q_len * k_len), dim3(BLOCK_SIZE), 0, stream,
                         static_cast<const bf16*>(q), static_cast<const bf16*>(k), scores, s);
  if (status == Status::ok) status = launch(softmax, blocks(heads * q_len), dim3(BLOCK_SIZE), 0, stream, scores, s);
  if (status != Status::ok) return static_cast<int>(status);
  return static_cast<int>(launch(multiply_pv, blocks(heads * q_len * dim), dim3(BLOCK_SIZE), 0, stream, scores,
                                 static_cast<const bf16*>(v), out, s));
}
