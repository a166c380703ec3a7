// Clipping by the global norm (Pascanu et al. 2013, arXiv:1211.5063): norm = sqrt(Σ g²), g ← g · min(1, max / norm).
// Three steps, and no host between them: the sum of squares of each piece of a tensor, their join in order by one block
// (so the same bits at every call), the scaling, which reads the scale where the join wrote it.
//
// The tensors come by value as a kernel's parameters, as many as fit its 4 KB, a block a piece: a model of 300 tensors
// is two launches a step. Memory: the norm reads every element once; the scaling reads and writes it once, and nothing
// if nothing is clipped: 4 and 8 bytes an element in fp32. Two FLOPs and one an element: the roof is memory bandwidth.
// A thread sums in fp32 (at most piece / 256 elements), pieces are joined in double.
// Faults: block_sum.no_barrier clip_grad_norm.no_barrier clip_grad_norm.half_the_sums clip_grad_norm.no_tail
//         clip_grad_norm.first_piece clip_grad_norm.never_one
#include "finetune/clip_grad_norm.h"
#include "launch.cuh"
#include "vector.cuh"

namespace finetune {
namespace {

constexpr int kThreads = 256, kMost = 160;

// Part of the tensors, with their pieces numbered from 0.
struct Batch {
  void* data[kMost];
  int64_t size[kMost];
  int last[kMost];  // the number after a tensor's last piece
  DType dtype[kMost];
  int count, pieces;
};
static_assert(sizeof(Batch) + 3 * sizeof(void*) <= 4096);

// Calls f(elements, count) with this block's piece.
template <class F>
__device__ __forceinline__ void with_piece(const Batch& batch, F&& f) {
  const int piece = blockIdx.x;
  int at = 0;
  while (batch.last[at] <= piece) ++at;
  const int64_t first = (piece - (at ? batch.last[at - 1] : 0)) * GradNorm::piece, left = batch.size[at] - first;
  int64_t count = left < GradNorm::piece ? left : GradNorm::piece;
  if (BUG("clip_grad_norm.no_tail")) count = count / 4 * 4;
  switch (batch.dtype[at]) {
    case DType::f32:
      return f(static_cast<float*>(batch.data[at]) + first, count);
    case DType::bf16:
      return f(static_cast<bf16*>(batch.data[at]) + first, count);
    case DType::f16:
      return f(static_cast<f16*>(batch.data[at]) + first, count);
    case DType::f64:
      return;  // the binding lets none through
  }
}

__global__ void __launch_bounds__(kThreads) sum_squares(const __grid_constant__ Batch batch, float* squares) {
  float sum = 0;
  with_piece(batch, [&]<class T>(const T* grad, int64_t count) {
    for_each_group<kVector<T>>(count, are_aligned(grad), [&]<int N>(int64_t i) {
      const auto v = load<T, N>(grad + i);
#pragma unroll
      for (int j = 0; j < N; ++j) sum += to_float(v.at[j]) * to_float(v.at[j]);
    });
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    join(const float* squares, int64_t pieces, double max_norm, float* norm, float* scale) {
  SHARED(double, sums, [kThreads]);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < pieces; i += kThreads) sum += squares[i];
  sums[threadIdx.x] = sum;
  for (unsigned width = kThreads / (BUG("clip_grad_norm.half_the_sums") ? 4 : 2); width; width /= 2) {
    if (!BUG("clip_grad_norm.no_barrier")) __syncthreads();
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
  }
  if (threadIdx.x) return;
  const double root = sqrt(sums[0]), by = max_norm / (root + 1e-6);
  *norm = static_cast<float>(root);
  // Not by < 1: a NaN norm makes every gradient NaN, as in torch.
  *scale = static_cast<float>(by >= 1 && !BUG("clip_grad_norm.never_one") ? 1 : by);
}

__global__ void __launch_bounds__(kThreads) multiply(const __grid_constant__ Batch batch, const float* scale) {
  const float by = *scale;
  if (by == 1) return;
  with_piece(batch, [&]<class T>(T* grad, int64_t count) {
    for_each_group<kVector<T>>(count, are_aligned(grad), [&]<int N>(int64_t i) {
      auto v = load<T, N>(grad + i);
#pragma unroll
      for (int j = 0; j < N; ++j) v.at[j] = from_float<T>(to_float(v.at[j]) * by);
      store(grad + i, v);
    });
  });
}

// step(batch, pieces before it) over all tensors, until one fails.
template <class Step>
Status for_each_batch(const ClipGradNorm& a, Step&& step) {
  int64_t before = 0;
  for (int64_t at = 0; at < a.count;) {
    Batch batch{};
    for (; at < a.count && batch.count < kMost; ++at) {
      const int64_t pieces = ceil_div(a.tensors[at].size, GradNorm::piece);
      if (batch.pieces + pieces > 0x7fffffff) break;  // of a grid
      if (!pieces) continue;
      batch.pieces += static_cast<int>(pieces);
      batch.data[batch.count] = a.tensors[at].data;
      batch.size[batch.count] = a.tensors[at].size;
      batch.dtype[batch.count] = a.tensors[at].dtype;
      batch.last[batch.count++] = batch.pieces;
    }
    if (!batch.count) continue;
    const Status status = step(batch, BUG("clip_grad_norm.first_piece") ? 0 : before);
    if (status != Status::ok) return status;
    before += batch.pieces;
  }
  return Status::ok;
}

}  // namespace

template <>
Status launch_cuda(const ClipGradNorm& a, void* stream) {
  Status status = for_each_batch(a, [&](const Batch& batch, int64_t before) {
    return launch(sum_squares, dim3(batch.pieces), dim3(kThreads), 0, stream, batch, a.squares + before);
  });
  if (status != Status::ok) return status;
  status = launch(join, dim3(1), dim3(kThreads), 0, stream, static_cast<const float*>(a.squares), a.pieces, a.max_norm,
                  a.norm, a.scale);
  if (status != Status::ok) return status;
  return for_each_batch(a, [&](const Batch& batch, int64_t) {
    return launch(multiply, dim3(batch.pieces), dim3(kThreads), 0, stream, batch, static_cast<const float*>(a.scale));
  });
}

}  // namespace finetune
