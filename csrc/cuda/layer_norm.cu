// LayerNorm (Ba, Kiros & Hinton 2016, arXiv:1607.06450): y = x̂ · w + b, x̂ = (x − mean) · rstd,
// rstd = 1 / sqrt(mean((x − mean)²) + eps); the variance in a second pass, so that a large mean cancels nothing.
// Backward, with g = dy · w:   dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),   dw = Σ_rows dy · x̂,   db = Σ_rows dy.
//
// Forward: a block takes a row, whose second and third pass are served by L1: 2 · rows · dim elements from and to
// memory. Backward (norm_backward.cuh): dy and x are read once into registers and dx is written, 3 · rows · dim
// elements; dw and db are sums in registers over a block's rows, written and read once for each of at most 384 blocks:
// 16 · blocks · dim bytes, 6 % of the rest at 16,384 rows in bf16. Rows of more than 4096 columns are read twice (5):
// their means come first. About 7 and 13 FLOPs an element, 1 to 2 FLOPs a byte: the roof is memory bandwidth.
// Faults: block_sum.no_barrier block_sum.no_second_barrier layer_norm.past_the_end layer_norm.mean_of_padded
//         layer_norm.one_pass_variance layer_norm.no_mean_of_g layer_norm.db_of_the_last_row
//         norm_backward.past_the_end norm_backward.one_buffer norm_backward.no_barrier
//         norm_backward.no_barrier_of_teams norm_backward.no_second_barrier_of_teams
//         norm_backward.no_barrier_of_parts norm_backward.first_block
#include "finetune/layer_norm.h"
#include "norm_backward.cuh"

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
  const float mean = block_sum(total) / count, center = BUG("layer_norm.one_pass_variance") ? 0 : mean;
  for_each_group<V>(dim, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) squares += (to_float(v.at[j]) - center) * (to_float(v.at[j]) - center);
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

// means (2, rows): mean(g) and mean(g · x̂), where a row has more columns than a block takes.
template <class T>
__global__ void __launch_bounds__(kThreads) row_means(LayerNormBackward a, float* means) {
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
    if (BUG("layer_norm.no_mean_of_g")) sums[0] = 0;
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      dw[j] += dy[j] * x[j];
      db[j] = (BUG("layer_norm.db_of_the_last_row") ? 0 : db[j]) + dy[j];
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
    return launch(forward<decltype(t)>, dim3(static_cast<unsigned>(a.rows)), dim3(kThreads), 0, stream, a);
  });
}

template <>
Status launch_cuda(const LayerNormBackward& a, void* stream) {
  const NormSplit split(a.rows, a.dim);
  const int64_t sum = split.blocks * a.dim, sums = (a.dweight != nullptr) + (a.dbias != nullptr);
  float* const means = split.tiles > 1 && a.rows ? a.partial + sums * sum : nullptr;
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned =
        a.dim % kVector<T> == 0 && are_aligned(static_cast<const char*>(a.x), static_cast<const char*>(a.dy),
                                               static_cast<const char*>(a.weight), static_cast<const char*>(a.dx));
    Status status = Status::ok;
    if (means) status = launch(row_means<T>, dim3(static_cast<unsigned>(a.rows)), dim3(kThreads), 0, stream, a, means);
    if (status == Status::ok) {
      status = launch_split(aligned ? backward<T, true> : backward<T, false>, split, stream, a,
                            static_cast<const float*>(means));
    }
    if (status == Status::ok) status = launch_join<T>(a.partial, split.blocks, a.dim, a.dweight, stream);
    if (status != Status::ok) return status;
    return launch_join<T>(a.partial + (a.dweight ? sum : 0), split.blocks, a.dim, a.dbias, stream);
  });
}

}  // namespace finetune
