// The end of an adaLN-Zero branch (Peebles & Xie 2023, arXiv:2212.09748).
//
//   forward    y = x + gate · branch, with a gate an item
//   backward   dbranch = gate · dy,   dgate = Σ dy · branch over the rows of an item;   dx is dy
//
// Forward: a block takes a row. Backward (norm_backward.cuh, a run of an item's rows a block): dgate is a sum in
// registers, written and read once a block.
//
//               bytes an element, fp32 (16 bits)               FLOPs an element
//   forward     12 (6): reads x and branch, writes y           2
//   backward    12 (6): reads dy and branch, writes dbranch    3
//
// At most half a FLOP a byte: the roof is memory bandwidth.
#include "finetune/gate_residual.h"

#include "norm_backward.cuh"

namespace finetune {
namespace {

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) forward(GateResidual a) {
  const int64_t row = blockIdx.x, item = row / a.rows;
  const T *x = static_cast<const T*>(a.x) + row * a.dim, *branch = static_cast<const T*>(a.branch) + row * a.dim,
          *gate = static_cast<const T*>(a.gate) + item * a.gate_stride;
  T* y = static_cast<T*>(a.y) + row * a.dim;
  for_each_group<kVector<T>>(a.dim, are_aligned(x, gate, branch, y), [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i), g = load<T, N>(gate + i), h = load<T, N>(branch + i);
    Vector<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.at[j] = from_float<T>(to_float(v.at[j]) + to_float(g.at[j]) * to_float(h.at[j]));
    store(y + i, out);
  });
}

// Two blocks a multiprocessor: without the number ptxas aims at three for 16 bits on sm_90, and spills.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kMostThreads, 2) backward(GateResidualBackward a, NormSplit s) {
  const Columns<T, kAligned> mine(s, a.dim);
  for (int64_t item = blockIdx.z; item < a.items; item += gridDim.z) {
    float gate[kOwned], dgate[kOwned] = {};
    mine.load(static_cast<const T*>(a.gate) + item * a.gate_stride, true, gate);
    for_each_row(s, a.rows, [&](int64_t row_of_item, bool exists, int) {
      const int64_t row = item * a.rows + row_of_item;
      float dy[kOwned], branch[kOwned];
      mine.load(static_cast<const T*>(a.dy) + row * a.dim, exists, dy);
      mine.load(static_cast<const T*>(a.branch) + row * a.dim, exists, branch);
#pragma unroll
      for (int j = 0; j < kOwned; ++j) {
        dgate[j] += dy[j] * branch[j];
        dy[j] *= gate[j];
      }
      if (exists) mine.store(static_cast<T*>(a.dbranch) + row * a.dim, dy);
    });
    join_teams(s, dgate);
    if (static_cast<int>(threadIdx.x) < s.lanes) {
      mine.store_sums(a.partial + (blockIdx.x * a.items + item) * a.dim, dgate);
    }
  }
}

}  // namespace

template <>
Status launch_cuda(const GateResidual& a, void* stream) {
  if (!a.items || !a.rows || !a.dim) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    const dim3 grid(static_cast<unsigned>(a.items * a.rows));
    return launch(forward<decltype(t)>, grid, dim3(BLOCK_SIZE), 0, stream, a);
  });
}

template <>
Status launch_cuda(const GateResidualBackward& a, void* stream) {
  const NormSplit split = item_split(a.items, a.rows, a.dim);
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    Status status = Status::ok;
    if (a.items && a.rows && a.dim) {
      const bool aligned = a.dim % kVector<T> == 0 && a.gate_stride % kVector<T> == 0 &&
                           are_aligned(static_cast<const char*>(a.dy), static_cast<const char*>(a.gate),
                                       static_cast<const char*>(a.branch), static_cast<const char*>(a.dbranch));
      const dim3 grid(static_cast<unsigned>(split.blocks), static_cast<unsigned>(split.tiles), grid_items(a.items));
      status = launch(aligned ? backward<T, true> : backward<T, false>, grid, dim3(split.lanes * split.teams), 0,
                      stream, a, split);
    }
    if (status != Status::ok) return status;
    return launch_join<T>(a.partial, split.blocks, a.items * a.dim, a.dgate, stream);
  });
}

}  // namespace finetune
