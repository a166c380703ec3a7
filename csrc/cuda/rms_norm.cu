// RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467): y = x · rstd · w, rstd = 1 / sqrt(mean(x²) + eps).
// Backward, with g = dy · w:   dx = rstd · (g − x · rstd² · mean(g · x)),   dw = Σ_rows dy · x · rstd.
//
// Memory: a block takes a row; its second pass over the row is served by L1 (forward: 2 · rows · dim · bytes from and
// to DRAM, backward 3). dw: each of `blocks` row blocks sums its rows into `partial`, a second kernel joins them in
// order. About 4 and 10 FLOPs an element, 0.5 to 1 FLOP a byte: the roof is memory bandwidth. Faults:
// block_sum.no_barrier block_sum.no_second_barrier rms_norm.past_the_end rms_norm.mean_of_padded
//         rms_norm.rstd_not_squared rms_norm.partial_not_cleared
#include "finetune/rms_norm.h"
#include "launch.cuh"
#include "vector.cuh"

namespace finetune {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) forward(RmsNorm a) {
  constexpr int V = kVector<T>;
  const int64_t row = blockIdx.x, dim = a.dim + (BUG("rms_norm.past_the_end") ? 1 : 0);
  const T *x = static_cast<const T*>(a.x) + row * a.dim, *w = static_cast<const T*>(a.weight);
  T* y = static_cast<T*>(a.y) + row * a.dim;
  const bool aligned = are_aligned(x, w, y);
  float squares = 0;
  for_each_group<V>(dim, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) squares += to_float(v.at[j]) * to_float(v.at[j]);
  });
  const int64_t count = BUG("rms_norm.mean_of_padded") ? ceil_div(a.dim, 32) * 32 : a.dim;
  const float rstd = rsqrtf(block_sum(squares) / static_cast<float>(count) + a.eps);
  if (threadIdx.x == 0) a.rstd[row] = rstd;
  for_each_group<V>(dim, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i), scale = load<T, N>(w + i);
    Vector<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.at[j] = from_float<T>(to_float(v.at[j]) * rstd * to_float(scale.at[j]));
    store(y + i, out);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward(RmsNormBackward a) {
  constexpr int V = kVector<T>;
  const int64_t per_block = ceil_div(a.rows, gridDim.x), begin = blockIdx.x * per_block;
  const int64_t end = begin + per_block < a.rows ? begin + per_block : a.rows;
  const auto* w = static_cast<const T*>(a.weight);
  float* dw = a.partial + blockIdx.x * a.dim;
  // A thread meets the same elements in every row, so dw needs no barrier.
  const auto *all_x = static_cast<const T*>(a.x), *all_dy = static_cast<const T*>(a.dy);
  auto* all_dx = static_cast<T*>(a.dx);
  const bool aligned = a.dim % V == 0 && are_aligned(all_x, all_dy, all_dx, w);
  if (a.dweight && !BUG("rms_norm.partial_not_cleared")) {
    for_each_group<V>(a.dim, aligned, [&]<int N>(int64_t i) {
      for (int j = 0; j < N; ++j) dw[i + j] = 0;
    });
  }
  for (int64_t row = begin; row < end; ++row) {
    const T *x = all_x + row * a.dim, *dy = all_dy + row * a.dim;
    T* dx = all_dx + row * a.dim;
    float dots = 0;
    for_each_group<V>(a.dim, aligned, [&]<int N>(int64_t i) {
      const auto v = load<T, N>(x + i), d = load<T, N>(dy + i), scale = load<T, N>(w + i);
#pragma unroll
      for (int j = 0; j < N; ++j) dots += to_float(d.at[j]) * to_float(scale.at[j]) * to_float(v.at[j]);
    });
    const float rstd = a.rstd[row], mean = block_sum(dots) / static_cast<float>(a.dim);
    const float pull = mean * rstd * rstd * (BUG("rms_norm.rstd_not_squared") ? 1.0f : rstd);
    for_each_group<V>(a.dim, aligned, [&]<int N>(int64_t i) {
      const auto v = load<T, N>(x + i), d = load<T, N>(dy + i), scale = load<T, N>(w + i);
      Vector<T, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float g = to_float(d.at[j]) * rstd;
        out.at[j] = from_float<T>(g * to_float(scale.at[j]) - to_float(v.at[j]) * pull);
        if (a.dweight) dw[i + j] += g * to_float(v.at[j]);
      }
      store(dx + i, out);
    });
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) join(const float* partial, int64_t blocks, int64_t dim, T* dweight) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= dim) return;
  float sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += partial[b * dim + i];
  dweight[i] = from_float<T>(sum);
}

}  // namespace

template <>
Status launch_cuda(const RmsNorm& a, void* stream) {
  if (!a.rows) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    return launch(forward<decltype(t)>, dim3(static_cast<unsigned>(a.rows)), dim3(kThreads), 0, stream, a);
  });
}

template <>
Status launch_cuda(const RmsNormBackward& a, void* stream) {
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t blocks = a.rows < RmsNormBackward::blocks ? a.rows : RmsNormBackward::blocks;
    if (blocks) {
      const Status status = launch(backward<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, a);
      if (status != Status::ok) return status;
    }
    if (!a.dweight || !a.dim) return Status::ok;
    const dim3 grid(static_cast<unsigned>(ceil_div(a.dim, kThreads)));
    return launch(join<T>, grid, dim3(kThreads), 0, stream, a.partial, blocks, a.dim, static_cast<T*>(a.dweight));
  });
}

}  // namespace finetune
