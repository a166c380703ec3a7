// RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467).
//
//   forward    y = x · rstd · w,   rstd = 1 / sqrt(mean(x²) + eps)
//   backward   dx = rstd · (g − x · rstd² · mean(g · x)),   dw = Σ_rows dy · x · rstd,   with g = dy · w
//
// Forward: a block takes a row of x (n_rows, n_cols); its second pass over the row is served by L1.
// Backward (norm_backward.cuh): dy and x are read once into registers. dw is a sum in registers over a block's rows,
// written and read once for each of at most 384 blocks. Rows of more than 4096 columns are read twice: their means
// come first.
//
//               elements from and to memory                    FLOPs an element
//   forward     2 · n_rows · n_cols                            4
//   backward    3 · n_rows · n_cols (5 of long rows)           10
//   dw          8 · blocks · n_cols bytes, 3 % of the rest at 16,384 rows in bf16
//
// 0.5 to 1.5 FLOPs a byte: the roof is memory bandwidth.
#include "finetune/rms_norm.h"

#include "norm_backward.cuh"

namespace finetune {
namespace {

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) forward(RmsNorm a) {
  constexpr int V = kVector<T>;
  const int64_t row = blockIdx.x, n_cols = a.dim;
  const T *x = static_cast<const T*>(a.x) + row * n_cols, *w = static_cast<const T*>(a.weight);
  T* y = static_cast<T*>(a.y) + row * n_cols;
  const bool aligned = are_aligned(x, w, y);
  float squares = 0;
  for_each_group<V>(n_cols, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) squares += to_float(v.at[j]) * to_float(v.at[j]);
  });
  const float rstd = rsqrtf(block_sum(squares) / static_cast<float>(n_cols) + a.eps);
  if (threadIdx.x == 0) a.rstd[row] = rstd;
  for_each_group<V>(n_cols, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i), scale = load<T, N>(w + i);
    Vector<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.at[j] = from_float<T>(to_float(v.at[j]) * rstd * to_float(scale.at[j]));
    store(y + i, out);
  });
}

// means (rows,): mean(g · x), where a row has more columns than a block takes.
template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) row_means(RmsNormBackward a, float* means) {
  const T *x = static_cast<const T*>(a.x) + blockIdx.x * a.dim, *dy = static_cast<const T*>(a.dy) + blockIdx.x * a.dim,
          *w = static_cast<const T*>(a.weight);
  float dots = 0;
  for_each_group<kVector<T>>(a.dim, are_aligned(x, dy, w), [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i), d = load<T, N>(dy + i), scale = load<T, N>(w + i);
#pragma unroll
    for (int j = 0; j < N; ++j) dots += to_float(d.at[j]) * to_float(scale.at[j]) * to_float(v.at[j]);
  });
  dots = block_sum(dots);
  if (threadIdx.x == 0) means[blockIdx.x] = dots / static_cast<float>(a.dim);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMostThreads) backward(RmsNormBackward a, const float* means, NormSplit s) {
  const Columns<T, kAligned> mine(s, a.dim);
  const bool first_team = static_cast<int>(threadIdx.x) < s.lanes;
  float w[kOwned], dw[kOwned] = {};
  mine.load(static_cast<const T*>(a.weight), true, w);
  for_each_row(s, a.rows, [&](int64_t row, bool exists, int turn) {
    float x[kOwned], dy[kOwned], dot[1] = {};
    mine.load(static_cast<const T*>(a.x) + row * a.dim, exists, x);
    mine.load(static_cast<const T*>(a.dy) + row * a.dim, exists, dy);
    const float rstd = exists ? a.rstd[row] : 0.0f;
    if (!means) {
#pragma unroll
      for (int j = 0; j < kOwned; ++j) dot[0] += dy[j] * w[j] * x[j];
      team_sums(s, turn, dot);
      dot[0] /= static_cast<float>(a.dim);
    } else if (exists) {
      dot[0] = means[row];
    }
    const float pull = dot[0] * rstd * rstd * rstd;
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      const float g = dy[j] * rstd;
      dw[j] += g * x[j];
      x[j] = g * w[j] - x[j] * pull;
    }
    if (exists) mine.store(static_cast<T*>(a.dx) + row * a.dim, x);
  });
  if (!a.dweight) return;
  join_teams(s, dw);
  if (first_team) mine.store_sums(a.partial + blockIdx.x * a.dim, dw);
}

}  // namespace

template <>
Status launch_cuda(const RmsNorm& a, void* stream) {
  if (!a.rows) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    return launch(forward<decltype(t)>, dim3(static_cast<unsigned>(a.rows)), dim3(BLOCK_SIZE), 0, stream, a);
  });
}

template <>
Status launch_cuda(const RmsNormBackward& a, void* stream) {
  const NormSplit split(a.rows, a.dim);
  float* const means = split.tiles > 1 && a.rows ? a.partial + (a.dweight ? split.blocks * a.dim : 0) : nullptr;
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    Status status =
        launch_rows(row_means<T>, backward<T, true>, backward<T, false>, kVector<T>, a, means, split, stream);
    if (status != Status::ok) return status;
    return launch_join<T>(a.partial, split.blocks, a.dim, a.dweight, stream);
  });
}

}  // namespace finetune
