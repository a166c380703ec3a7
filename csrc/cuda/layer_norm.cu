// LayerNorm (Ba, Kiros & Hinton 2016, arXiv:1607.06450): y = x̂ · w + b, x̂ = (x − mean) · rstd,
// rstd = 1 / sqrt(mean((x − mean)²) + eps); the variance in a second pass, so that a large mean cancels nothing.
// Backward, with g = dy · w:   dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),   dw = Σ_rows dy · x̂,   db = Σ_rows dy.
//
// Memory: a block takes a row, whose second and third pass are served by L1: 2 · rows · dim · bytes from and to DRAM
// forward, 3 backward. dw, db: each of `blocks` row blocks sums its rows into `partial`, a second kernel joins them in
// order. About 7 and 13 FLOPs an element, 1 to 2 FLOPs a byte: the roof is memory bandwidth.
// Faults: block_sum.no_barrier block_sum.no_second_barrier layer_norm.past_the_end layer_norm.mean_of_padded
//         layer_norm.one_pass_variance layer_norm.no_mean_of_g layer_norm.partial_not_cleared
#include "finetune/layer_norm.h"
#include "launch.cuh"
#include "vector.cuh"

namespace finetune {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) forward(LayerNorm a) {
  constexpr int V = kVector<T>;
  const int64_t row = blockIdx.x, dim = a.dim + (BUG("layer_norm.past_the_end") ? 1 : 0);
  const T *x = static_cast<const T*>(a.x) + row * a.dim, *w = static_cast<const T*>(a.weight),
          *b = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y) + row * a.dim;
  const bool aligned = are_aligned(x, w, b, y);
  const auto count = static_cast<float>(BUG("layer_norm.mean_of_padded") ? ceil_div(a.dim, 32) * 32 : a.dim);
  float total = 0, squares = 0;
  for_each_group<V>(dim, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) total += to_float(v.at[j]);
  });
  const float mean = block_sum(total) / count, centre = BUG("layer_norm.one_pass_variance") ? 0 : mean;
  for_each_group<V>(dim, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) squares += (to_float(v.at[j]) - centre) * (to_float(v.at[j]) - centre);
  });
  float variance = block_sum(squares) / count;
  if (BUG("layer_norm.one_pass_variance")) variance -= mean * mean;
  const float rstd = rsqrtf(variance + a.eps);
  if (threadIdx.x == 0) a.mean[row] = mean, a.rstd[row] = rstd;
  for_each_group<V>(dim, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i), scale = load<T, N>(w + i), shift = b ? load<T, N>(b + i) : Vector<T, N>{};
    Vector<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      out.at[j] = from_float<T>((to_float(v.at[j]) - mean) * rstd * to_float(scale.at[j]) + to_float(shift.at[j]));
    }
    store(y + i, out);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward(LayerNormBackward a) {
  constexpr int V = kVector<T>;
  const int64_t per_block = ceil_div(a.rows, gridDim.x), begin = blockIdx.x * per_block;
  const int64_t end = begin + per_block < a.rows ? begin + per_block : a.rows;
  const bool sums = a.dweight || a.dbias;
  float *dw = sums ? a.partial + blockIdx.x * a.dim : nullptr, *db = sums ? dw + a.blocks * a.dim : nullptr;
  const auto *all_x = static_cast<const T*>(a.x), *all_dy = static_cast<const T*>(a.dy),
             *w = static_cast<const T*>(a.weight);
  auto* all_dx = static_cast<T*>(a.dx);
  // A thread meets the same elements in every row, so dw and db need no barrier.
  const bool aligned = a.dim % V == 0 && are_aligned(all_x, all_dy, all_dx, w);
  if (sums && !BUG("layer_norm.partial_not_cleared")) {
    for_each_group<V>(a.dim, aligned, [&]<int N>(int64_t i) {
      for (int j = 0; j < N; ++j) dw[i + j] = db[i + j] = 0;
    });
  }
  for (int64_t row = begin; row < end; ++row) {
    const T *x = all_x + row * a.dim, *dy = all_dy + row * a.dim;
    T* dx = all_dx + row * a.dim;
    const float mean = a.mean[row], rstd = a.rstd[row];
    float gs = 0, dots = 0;  // Σ g and Σ g · x̂
    for_each_group<V>(a.dim, aligned, [&]<int N>(int64_t i) {
      const auto v = load<T, N>(x + i), d = load<T, N>(dy + i), scale = load<T, N>(w + i);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float g = to_float(d.at[j]) * to_float(scale.at[j]);
        gs += g;
        dots += g * ((to_float(v.at[j]) - mean) * rstd);
      }
    });
    const auto count = static_cast<float>(a.dim);
    const float push = BUG("layer_norm.no_mean_of_g") ? 0 : block_sum(gs) / count, pull = block_sum(dots) / count;
    for_each_group<V>(a.dim, aligned, [&]<int N>(int64_t i) {
      const auto v = load<T, N>(x + i), d = load<T, N>(dy + i), scale = load<T, N>(w + i);
      Vector<T, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float dy_j = to_float(d.at[j]), normal = (to_float(v.at[j]) - mean) * rstd;
        out.at[j] = from_float<T>((dy_j * to_float(scale.at[j]) - push - normal * pull) * rstd);
        if (sums) dw[i + j] += dy_j * normal, db[i + j] += dy_j;
      }
      store(dx + i, out);
    });
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) join(const float* partial, int64_t blocks, int64_t dim, T* sum) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= dim) return;
  float total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += partial[b * dim + i];
  sum[i] = from_float<T>(total);
}

}  // namespace

template <>
Status launch_cuda(const LayerNorm& a, void* stream) {
  if (!a.rows) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    return launch(forward<decltype(t)>, dim3(static_cast<unsigned>(a.rows)), dim3(kThreads), 0, stream, a);
  });
}

template <>
Status launch_cuda(const LayerNormBackward& a, void* stream) {
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t blocks = a.rows < a.blocks ? a.rows : a.blocks;
    Status status = Status::ok;
    if (blocks) status = launch(backward<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, a);
    const dim3 grid(static_cast<unsigned>(ceil_div(a.dim, kThreads)));
    const float* partial = a.partial;
    for (void* sum : {a.dweight, a.dbias}) {
      if (sum && a.dim && status == Status::ok) {
        status = launch(join<T>, grid, dim3(kThreads), 0, stream, partial, blocks, a.dim, static_cast<T*>(sum));
      }
      partial += a.blocks * a.dim;
    }
    return status;
  });
}

}  // namespace finetune
