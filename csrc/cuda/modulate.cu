// adaLN's modulation (Peebles & Xie 2023, arXiv:2212.09748, §3.2): LayerNorm, then a scale and a shift an item.
//
//   forward    y = x̂ · (1 + scale) + shift,   x̂ = (x − mean) · rstd,   rstd = 1 / sqrt(mean((x − mean)²) + eps)
//   backward   dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),   g = dy · (1 + scale)
//              dscale = Σ dy · x̂,   dshift = Σ dy over the rows of an item
//
// Forward: a block takes a row of x (items · rows, dim). The variance has a pass for itself, so that a large mean
// cancels nothing; the second and the third pass over the row are served by L1.
// Backward (norm_backward.cuh, a run of an item's rows a block): dy and x are read once into registers, dscale and
// dshift are sums in registers, written and read once a block. Rows of more than 4096 columns are read twice: their
// means come first.
//
//               elements from and to memory                    FLOPs an element
//   forward     2 · items · rows · dim                         7
//   backward    3 · items · rows · dim (5 of long rows)        13
//
// 1 to 2 FLOPs a byte: the roof is memory bandwidth.
#include "finetune/modulate.h"

#include "norm_backward.cuh"
#include "norm_forward.cuh"

namespace finetune {
namespace {

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) forward(Modulate a) {
  constexpr int V = kVector<T>;
  const int64_t row = blockIdx.x, item = row / a.rows, n_cols = a.dim;
  const T *x = static_cast<const T*>(a.x) + row * n_cols,
          *scale = static_cast<const T*>(a.scale) + item * a.scale_stride,
          *shift = static_cast<const T*>(a.shift) + item * a.shift_stride;
  T* y = static_cast<T*>(a.y) + row * n_cols;
  const bool aligned = are_aligned(x, scale, shift, y);
  const RowStatistics found = row_statistics(x, n_cols, aligned, a.eps);
  const float mean = found.mean, rstd = found.rstd;
  if (threadIdx.x == 0) a.mean[row] = mean, a.rstd[row] = rstd;
  for_each_group<V>(n_cols, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i), factor = load<T, N>(scale + i), add = load<T, N>(shift + i);
    Vector<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float normal = (to_float(v.at[j]) - mean) * rstd;
      out.at[j] = from_float<T>(normal * (1.0f + to_float(factor.at[j])) + to_float(add.at[j]));
    }
    store(y + i, out);
  });
}

// means (2, items · rows): mean(g) and mean(g · x̂), where a row has more columns than a block takes.
template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) row_means(ModulateBackward a, float* means) {
  const int64_t row = blockIdx.x, all = a.items * a.rows;
  const T *x = static_cast<const T*>(a.x) + row * a.dim, *dy = static_cast<const T*>(a.dy) + row * a.dim,
          *scale = static_cast<const T*>(a.scale) + row / a.rows * a.scale_stride;
  const float mean = a.mean[row], rstd = a.rstd[row], count = static_cast<float>(a.dim);
  float gs = 0, dots = 0;
  for_each_group<kVector<T>>(a.dim, are_aligned(x, dy, scale), [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i), d = load<T, N>(dy + i), factor = load<T, N>(scale + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float g = to_float(d.at[j]) * (1.0f + to_float(factor.at[j]));
      gs += g;
      dots += g * ((to_float(v.at[j]) - mean) * rstd);
    }
  });
  gs = block_sum(gs);
  dots = block_sum(dots);
  if (threadIdx.x == 0) means[row] = gs / count, means[all + row] = dots / count;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMostThreads) backward(ModulateBackward a, const float* means, NormSplit s) {
  const Columns<T, kAligned> mine(s, a.dim);
  const bool first_team = static_cast<int>(threadIdx.x) < s.lanes;
  const int64_t all = a.items * a.rows;
  for (int64_t item = blockIdx.z; item < a.items; item += gridDim.z) {
    float factor[kOwned], dscale[kOwned] = {}, dshift[kOwned] = {};
    mine.load(static_cast<const T*>(a.scale) + item * a.scale_stride, true, factor);
#pragma unroll
    for (int j = 0; j < kOwned; ++j) factor[j] += 1.0f;
    for_each_row(s, a.rows, [&](int64_t row_of_item, bool exists, int turn) {
      const int64_t row = item * a.rows + row_of_item;
      float x[kOwned], dy[kOwned], sums[2] = {};  // Σ g and Σ g · x̂, then their means
      mine.load(static_cast<const T*>(a.x) + row * a.dim, exists, x);
      mine.load(static_cast<const T*>(a.dy) + row * a.dim, exists, dy);
      const float mean = exists ? a.mean[row] : 0.0f, rstd = exists ? a.rstd[row] : 0.0f;
#pragma unroll
      for (int j = 0; j < kOwned; ++j) x[j] = (x[j] - mean) * rstd;  // x̂; where there is no column dy is 0
      if (!means) {
#pragma unroll
        for (int j = 0; j < kOwned; ++j) sums[0] += dy[j] * factor[j], sums[1] += dy[j] * factor[j] * x[j];
        team_sums(s, turn, sums);
        sums[0] /= static_cast<float>(a.dim), sums[1] /= static_cast<float>(a.dim);
      } else if (exists) {
        sums[0] = means[row], sums[1] = means[all + row];
      }
#pragma unroll
      for (int j = 0; j < kOwned; ++j) {
        dscale[j] += dy[j] * x[j];
        dshift[j] += dy[j];
        x[j] = (dy[j] * factor[j] - sums[0] - x[j] * sums[1]) * rstd;
      }
      if (exists) mine.store(static_cast<T*>(a.dx) + row * a.dim, x);
    });
    float* partial = a.partial + (blockIdx.x * a.items + item) * a.dim;
    join_teams(s, dscale);
    if (first_team) mine.store_sums(partial, dscale);
    join_teams(s, dshift);
    if (first_team) mine.store_sums(partial + s.blocks * a.items * a.dim, dshift);
    __syncthreads();  // the next item's sums begin with the buffer that the last row's may be in
  }
}

}  // namespace

template <>
Status launch_cuda(const Modulate& a, void* stream) {
  if (!a.items || !a.rows || !a.dim) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    const dim3 grid(static_cast<unsigned>(a.items * a.rows));
    return launch(forward<decltype(t)>, grid, dim3(BLOCK_SIZE), 0, stream, a);
  });
}

template <>
Status launch_cuda(const ModulateBackward& a, void* stream) {
  const NormSplit split = item_split(a.items, a.rows, a.dim);
  const int64_t sums = split.blocks * a.items * a.dim;
  const bool any = a.items && a.rows && a.dim;
  float* const means = split.tiles > 1 && any ? a.partial + 2 * sums : nullptr;
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    Status status = Status::ok;
    if (means) {
      const dim3 rows(static_cast<unsigned>(a.items * a.rows));
      status = launch(row_means<T>, rows, dim3(BLOCK_SIZE), 0, stream, a, means);
      if (status != Status::ok) return status;
    }
    if (any) {
      const bool aligned = a.dim % kVector<T> == 0 && a.scale_stride % kVector<T> == 0 &&
                           are_aligned(static_cast<const char*>(a.x), static_cast<const char*>(a.dy),
                                       static_cast<const char*>(a.scale), static_cast<const char*>(a.dx));
      const dim3 grid(static_cast<unsigned>(split.blocks), static_cast<unsigned>(split.tiles), grid_items(a.items));
      status = launch(aligned ? backward<T, true> : backward<T, false>, grid, dim3(split.lanes * split.teams), 0,
                      stream, a, means, split);
    }
    if (status == Status::ok) {
      status = launch_join<T>(a.partial, split.blocks, a.items * a.dim, a.dscale, stream);
    }
    if (status != Status::ok) return status;
    return launch_join<T>(a.partial + sums, split.blocks, a.items * a.dim, a.dshift, stream);
  });
}

}  // namespace finetune
