// RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467): y = x · rstd · w, rstd = 1 / sqrt(mean(x²) + eps).
// Backward, with g = dy · w:   dx = rstd · (g − x · rstd² · mean(g · x)),   dw = Σ_rows dy · x · rstd.
//
// Forward: a block takes a row; its second pass over the row is served by L1. 2 · rows · dim elements from and to
// memory. Backward (norm_backward.cuh): dy and x are read once into registers and dx is written, 3 · rows · dim
// elements; dw is a sum in registers over a block's rows, written and read once for each of at most 384 blocks:
// 8 · blocks · dim bytes, 3 % of the rest at 16,384 rows in bf16. Rows of more than 4096 columns are read twice (5):
// their means come first. About 4 and 10 FLOPs an element, 0.5 to 1.5 FLOPs a byte: the roof is memory bandwidth.
// Faults: block_sum.no_barrier rms_norm.past_the_end rms_norm.mean_of_padded
//         rms_norm.rstd_not_squared rms_norm.dw_of_the_last_row norm_backward.past_the_end norm_backward.one_buffer
//         norm_backward.no_barrier norm_backward.no_barrier_of_teams norm_backward.no_barrier_of_parts
//         norm_backward.first_block
#include "finetune/rms_norm.h"
#include "norm_backward.cuh"

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

// means (rows,): mean(g · x), where a row has more columns than a block takes.
template <class T>
__global__ void __launch_bounds__(kThreads) row_means(RmsNormBackward a, float* means) {
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
    const float pull = dot[0] * rstd * rstd * (BUG("rms_norm.rstd_not_squared") ? 1.0f : rstd);
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      const float g = dy[j] * rstd;
      dw[j] = (BUG("rms_norm.dw_of_the_last_row") ? 0 : dw[j]) + g * x[j];
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
    return launch(forward<decltype(t)>, dim3(static_cast<unsigned>(a.rows)), dim3(kThreads), 0, stream, a);
  });
}

template <>
Status launch_cuda(const RmsNormBackward& a, void* stream) {
  const NormSplit split(a.rows, a.dim);
  float* const means = split.tiles > 1 && a.rows ? a.partial + (a.dweight ? split.blocks * a.dim : 0) : nullptr;
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
    if (status != Status::ok) return status;
    return launch_join<T>(a.partial, split.blocks, a.dim, a.dweight, stream);
  });
}

}  // namespace finetune
