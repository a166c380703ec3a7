// The backward pass of rms_norm and layer_norm, as far as they share it (NormSplit says who takes what): a team of
// threads takes a row and meets the same columns in each, so dw and db are sums in registers. They leave them once a
// block, as rows of `partial` (blocks, n_cols), which `join_rows` adds in order.
#pragma once

#include "device/launch.cuh"
#include "device/vector.cuh"
#include "finetune/norm_split.h"

namespace finetune {

constexpr int BLOCK_SIZE = 128;  // of the kernels in which a block takes a row
constexpr int kOwned = NormSplit::kOwned, kMostThreads = NormSplit::kWidest / kOwned;

// A thread's columns: kOwned / V groups of V adjacent ones, a group of each lane after the other. V is 16 bytes where
// rows allow it (kAligned) and else 1.
template <class T, bool kAligned>
struct Columns {
  static constexpr int V = kAligned ? kVector<T> : 1;
  int64_t tile;  // first column of the block's tile
  int first, step, end;

  __device__ Columns(const NormSplit& s, int64_t dim)
      : tile(static_cast<int64_t>(blockIdx.y) * s.lanes * kOwned), first(threadIdx.x % s.lanes * V), step(s.lanes * V) {
    end = dim - tile < s.lanes * kOwned ? static_cast<int>(dim - tile) : s.lanes * kOwned;
  }
  // f(the group's first column, the number of its first element)
  template <class F>
  __device__ __forceinline__ void for_each(F&& f) const {
#pragma unroll
    for (int i = 0; i < kOwned; i += V) {
      if (const int column = first + i / V * step; column < end) {
        f(column, i);
      }
    }
  }
  __device__ __forceinline__ void load(const T* row, bool exists, float (&v)[kOwned]) const {
#pragma unroll
    for (int j = 0; j < kOwned; ++j) v[j] = 0;
    if (!exists) return;
    row += tile;
    for_each([&](int column, int i) {
      const auto group = finetune::load<T, V>(row + column);
#pragma unroll
      for (int j = 0; j < V; ++j) v[i + j] = to_float(group.at[j]);
    });
  }
  __device__ __forceinline__ void store(T* row, const float (&v)[kOwned]) const {
    row += tile;
    for_each([&](int column, int i) {
      Vector<T, V> group;
#pragma unroll
      for (int j = 0; j < V; ++j) group.at[j] = from_float<T>(v[i + j]);
      finetune::store(row + column, group);
    });
  }
  // The sums, 16 bytes at a time too.
  __device__ __forceinline__ void store_sums(float* row, const float (&v)[kOwned]) const {
    constexpr int N = V < 4 ? V : 4;
    row += tile;
    for_each([&](int column, int i) {
#pragma unroll
      for (int j = 0; j < V; j += N) {
        Vector<float, N> group;
#pragma unroll
        for (int k = 0; k < N; ++k) group.at[k] = v[i + j + k];
        finetune::store(row + column + j, group);
      }
    });
  }
};

// Each of v's sums over the team, in all of its threads. All threads of the block call it, `turn` being 0 and 1 in
// turn: with two buffers one barrier a call is enough.
template <int N>
__device__ __forceinline__ void team_sums(const NormSplit& s, int turn, float (&v)[N]) {
  const int lanes = s.lanes;
  if (lanes < 32) {
    for (int bits = lanes / 2; bits; bits /= 2) {
#pragma unroll
      for (int n = 0; n < N; ++n) v[n] += __shfl_xor_sync(0xffffffffu, v[n], bits);
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = warp_sum(v[n]);
  if (lanes == 32) return;
  SHARED(float, sums, [2][N][kMostThreads / 32]);
  const int lane = threadIdx.x % 32, warps = lanes / 32, first = threadIdx.x / lanes * warps;
  if (lane == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) sums[turn][n][threadIdx.x / 32] = v[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = warp_sum(lane < warps ? sums[turn][n][first + lane] : 0.0f);
}

// v becomes its sum over the block's teams, in order, in the first team.
__device__ __forceinline__ void join_teams(const NormSplit& s, float (&v)[kOwned]) {
  if (s.teams == 1) return;
  SHARED(float, parts, [kOwned][NormSplit::kThreads]);
#pragma unroll
  for (int j = 0; j < kOwned; ++j) parts[j][threadIdx.x] = v[j];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < s.lanes) {
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      v[j] = 0;
#pragma unroll 1
      for (int i = 0; i < s.teams; ++i) v[j] += parts[j][i * s.lanes + threadIdx.x];
    }
  }
  __syncthreads();  // the buffer is free for the next call
}

// Calls f(row, whether it is one) for the block's rows, a row a team and step.
template <class F>
__device__ __forceinline__ void for_each_row(const NormSplit& s, int64_t rows, F&& f) {
  const int64_t per_block = ceil_div(rows, s.blocks), begin = blockIdx.x * per_block;
  const int64_t end = begin + per_block < rows ? begin + per_block : rows;
  int turn = 0;
  for (int64_t first = begin; first < end; first += s.teams, turn ^= 1) {
    const int64_t row = first + threadIdx.x / s.lanes;
    f(row, row < end, turn);
  }
}

constexpr int kJoinColumns = 32, kJoinParts = 16;

// sum (dim,) = Σ over partial's rows (blocks, dim): each of kJoinParts threads a column takes every kJoinParts-th row.
template <class T>
__global__ void __launch_bounds__(kJoinColumns* kJoinParts)
    join_rows(const float* partial, int64_t blocks, int64_t dim, T* sum) {
  SHARED(float, parts, [kJoinParts][kJoinColumns]);
  const int at = threadIdx.x % kJoinColumns, part = threadIdx.x / kJoinColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kJoinColumns + at;
  float total = 0;
  if (column < dim) {
#pragma unroll 8
    for (int64_t b = part; b < blocks; b += kJoinParts) total += partial[b * dim + column];
  }
  parts[part][at] = total;
  __syncthreads();
  if (part || column >= dim) return;
  total = 0;
  for (int i = 0; i < kJoinParts; ++i) total += parts[i][at];
  sum[column] = from_float<T>(total);
}

template <class T>
Status launch_join(const float* partial, int64_t blocks, int64_t dim, void* sum, void* stream) {
  if (!sum || !dim) return Status::ok;
  return launch(join_rows<T>, dim3(static_cast<unsigned>(ceil_div(dim, kJoinColumns))), dim3(kJoinColumns * kJoinParts),
                0, stream, partial, blocks, dim, static_cast<T*>(sum));
}

// The pass over the rows: their means first where a row has more columns than a block takes (`means`, or null), then
// dx and the blocks' sums, by the kernel for rows of whole vectors (`aligned_rows`) or the one for any.
template <class Args>
Status launch_rows(void (*row_means)(Args, float*), void (*aligned_rows)(Args, const float*, NormSplit),
                   void (*any_rows)(Args, const float*, NormSplit), int vector, const Args& a, float* means,
                   const NormSplit& s, void* stream) {
  if (!s.blocks) return Status::ok;
  if (means) {
    const Status status = launch(row_means, dim3(static_cast<unsigned>(a.rows)), dim3(BLOCK_SIZE), 0, stream, a, means);
    if (status != Status::ok) return status;
  }
  const bool aligned =
      a.dim % vector == 0 && are_aligned(static_cast<const char*>(a.x), static_cast<const char*>(a.dy),
                                         static_cast<const char*>(a.weight), static_cast<const char*>(a.dx));
  const dim3 grid(static_cast<unsigned>(s.blocks), static_cast<unsigned>(s.tiles));
  return launch(aligned ? aligned_rows : any_rows, grid, dim3(s.lanes * s.teams), 0, stream, a, means, s);
}

}  // namespace finetune
