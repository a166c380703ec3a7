// LayerNorm (Ba, Kiros & Hinton 2016, arXiv:1607.06450).
//
//   forward    y = x̂ · w + b,   x̂ = (x − mean) · rstd,   rstd = 1 / sqrt(mean((x − mean)²) + eps)
//   backward   dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),   dw = Σ_rows dy · x̂,   db = Σ_rows dy;   g = dy · w
//
// Forward: a block takes a row of x (n_rows, n_cols). The variance has a pass for itself, so that a large mean cancels
// nothing; the second and the third pass over the row are served by L1.
// Backward (norm_backward.cuh): dy and x are read once into registers. dw and db are sums in registers over a block's
// rows, written and read once for each of at most 384 blocks. Rows of more than 4096 columns are read twice: their
// means come first.
//
//               elements from and to memory                    FLOPs an element
//   forward     2 · n_rows · n_cols                            7
//   backward    3 · n_rows · n_cols (5 of long rows)           13
//   dw, db      16 · blocks · n_cols bytes, 6 % of the rest at 16,384 rows in bf16
//
// 1 to 2 FLOPs a byte: the roof is memory bandwidth.
#include "finetune/layer_norm.h"

#include "norm_backward.cuh"
#include "norm_forward.cuh"

namespace finetune {
namespace {

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) forward(LayerNorm a) {
  constexpr int V = kVector<T>;
  const int64_t row = blockIdx.x, n_cols = a.dim;
  const T *x = static_cast<const T*>(a.x) + row * n_cols, *w = static_cast<const T*>(a.weight),
          *b = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y) + row * n_cols;
  const bool aligned = are_aligned(x, w, b, y);
  const RowStatistics found = row_statistics(x, n_cols, aligned, a.eps);
  const float mean = found.mean, rstd = found.rstd;
  if (threadIdx.x == 0) a.mean[row] = mean, a.rstd[row] = rstd;
  for_each_group<V>(n_cols, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i), scale = load<T, N>(w + i), shift = b ? load<T, N>(b + i) : Vector<T, N>{};
    Vector<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      out.at[j] = from_float<T>((to_float(v.at[j]) - mean) * rstd * to_float(scale.at[j]) + to_float(shift.at[j]));
    }
    store(y + i, out);
  });
}

// means (2, rows): mean(g) and mean(g · x̂), where a row has more columns than a block takes.
template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) row_means(LayerNormBackward a, float* means) {
  const T *x = static_cast<const T*>(a.x) + blockIdx.x * a.dim, *dy = static_cast<const T*>(a.dy) + blockIdx.x * a.dim,
          *w = static_cast<const T*>(a.weight);
  const float mean = a.mean[blockIdx.x], rstd = a.rstd[blockIdx.x], count = static_cast<float>(a.dim);
  float gs = 0, dots = 0;
  for_each_group<kVector<T>>(a.dim, are_aligned(x, dy, w), [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i), d = load<T, N>(dy + i), scale = load<T, N>(w + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float g = to_float(d.at[j]) * to_float(scale.at[j]);
      gs += g;
      dots += g * ((to_float(v.at[j]) - mean) * rstd);
    }
  });
  gs = block_sum(gs);
  dots = block_sum(dots);
  if (threadIdx.x == 0) means[blockIdx.x] = gs / count, means[a.rows + blockIdx.x] = dots / count;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMostThreads) backward(LayerNormBackward a, const float* means, NormSplit s) {
  const Columns<T, kAligned> mine(s, a.dim);
  const bool first_team = static_cast<int>(threadIdx.x) < s.lanes;
  float w[kOwned], dw[kOwned] = {}, db[kOwned] = {};
  mine.load(static_cast<const T*>(a.weight), true, w);
  for_each_row(s, a.rows, [&](int64_t row, bool exists, int turn) {
    float x[kOwned], dy[kOwned], sums[2] = {};  // Σ g and Σ g · x̂, then their means
    mine.load(static_cast<const T*>(a.x) + row * a.dim, exists, x);
    mine.load(static_cast<const T*>(a.dy) + row * a.dim, exists, dy);
    const float mean = exists ? a.mean[row] : 0.0f, rstd = exists ? a.rstd[row] : 0.0f;
#pragma unroll
    for (int j = 0; j < kOwned; ++j) x[j] = (x[j] - mean) * rstd;  // x̂; where there is no column w and dy are 0
    if (!means) {
#pragma unroll
      for (int j = 0; j < kOwned; ++j) sums[0] += dy[j] * w[j], sums[1] += dy[j] * w[j] * x[j];
      team_sums(s, turn, sums);
      sums[0] /= static_cast<float>(a.dim), sums[1] /= static_cast<float>(a.dim);
    } else if (exists) {
      sums[0] = means[row], sums[1] = means[a.rows + row];
    }
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      dw[j] += dy[j] * x[j];
      db[j] += dy[j];
      x[j] = (dy[j] * w[j] - sums[0] - x[j] * sums[1]) * rstd;
    }
    if (exists) mine.store(static_cast<T*>(a.dx) + row * a.dim, x);
  });
  float* partial = a.partial + blockIdx.x * a.dim;
  if (a.dweight) {
    join_teams(s, dw);
    if (first_team) mine.store_sums(partial, dw);
    partial += s.blocks * a.dim;
  }
  if (a.dbias) {
    join_teams(s, db);
    if (first_team) mine.store_sums(partial, db);
  }
}

}  // namespace

template <>
Status launch_cuda(const LayerNorm& a, void* stream) {
  if (!a.rows) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    return launch(forward<decltype(t)>, dim3(static_cast<unsigned>(a.rows)), dim3(BLOCK_SIZE), 0, stream, a);
  });
}

template <>
Status launch_cuda(const LayerNormBackward& a, void* stream) {
  const NormSplit split(a.rows, a.dim);
  const int64_t sum = split.blocks * a.dim, sums = (a.dweight != nullptr) + (a.dbias != nullptr);
  float* const means = split.tiles > 1 && a.rows ? a.partial + sums * sum : nullptr;
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    Status status =
        launch_rows(row_means<T>, backward<T, true>, backward<T, false>, kVector<T>, a, means, split, stream);
    if (status == Status::ok) status = launch_join<T>(a.partial, split.blocks, a.dim, a.dweight, stream);
    if (status != Status::ok) return status;
    return launch_join<T>(a.partial + (a.dweight ? sum : 0), split.blocks, a.dim, a.dbias, stream);
  });
}

}  // namespace finetune
