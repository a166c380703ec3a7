// Projection onto the vocabulary and cross-entropy with z-loss, without the logits (Cut Cross-Entropy, Wijmans et al.
// 2024, arXiv:2411.09009; online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867). With L = x · Wᵀ:
//   lse = log Σ exp(l_j),   loss = lse − l_t + z · lse²,   d loss / d l_j = softmax(l)_j · (1 + 2 z lse) − [j = t] =
//   D_j, dx = D · W,   dW = Dᵀ · x.
//
//   1. find_kept     the rows that count, as a list: the others are never multiplied
//   2. statistics    a block makes 64 × 64 squares of L along its part of the vocabulary and keeps, in registers, each
//                    row's running maximum and sum of exponentials; the target's logit is stored where it passes by
//   3. join_parts, add_losses
//   4. for each tile of 8192 words and chunk of 1024 rows: make_dlogits makes the tile's logits anew, to the same bits,
//      and from them D (16 MB in 16 bits, which stays in L2); multiply_dx and multiply_dweight add its products in fp32
//   5. spread_dx     to the places of the rows that count, rounded once
// Sums go in a fixed order, without atomics. The number of rows that count stays on the device, and scales the ends.
//
// All four products are one function: tiles of 64 × 64 bytes through cp.async, double buffered, rows padded by 16 bytes
// (so that ldmatrix meets no bank twice), 4 warps of 32 × 32 outputs each, mma m16n8k16 for 16-bit elements; fp32 by
// fused multiply-adds in the same fragments. FLOPs: 2 · N · V · C forward, three times that backward. A square reads
// 128 · C elements for 64 · 64 · 2 · C FLOPs, 32 FLOPs a byte of L2 with 16 bits; DRAM sees W once per chunk: compute
// and L2 are the roofs.
// Faults: linear_cross_entropy.no_barrier linear_cross_entropy.no_second_barrier linear_cross_entropy.wait_count
//         linear_cross_entropy.fragment linear_cross_entropy.no_rescale linear_cross_entropy.no_mask
//         linear_cross_entropy.stale_tail linear_cross_entropy.global_store linear_cross_entropy.overwrite
//         linear_cross_entropy.mean_of_all linear_cross_entropy.offsets_of_32_bits linear_cross_entropy.odd_base
//         linear_cross_entropy.no_nan
#include "finetune/linear_cross_entropy.h"
#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

using Args = LinearCrossEntropy;
constexpr int kThreads = 128, kSide = Args::side;
constexpr float kLowest = -3.402823466e38f;    // of a finite float: where a maximum starts, for −inf − −inf is NaN
constexpr int kTileBytes = kSide * (64 + 16);  // of an operand in shared memory

template <class T>
constexpr int kDepth = 64 / sizeof(T);  // terms of the sums that a tile holds
// Elements from row to row of a tile: (outer, depth), or (depth, outer) where the depth is memory's outer dimension.
template <class T, bool kDepthMajor>
constexpr int kPitch = (kDepthMajor ? kSide : kDepth<T>)+kVector<T>;

// A matrix (outer, depth) in global memory, or its transpose if it is depth-major. `rows`: picks memory's rows.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;
  const int64_t* rows;
  int64_t outer, depth;
  bool aligned = stride % kVector<T> == 0 && (are_aligned(data) || BUG("linear_cross_entropy.odd_base"));
};

// Copies the tile at (outer0, depth0), zeros where the matrix ends.
template <class T, bool kDepthMajor>
__device__ __forceinline__ void fetch(T* tile, const Operand<T>& m, int64_t outer0, int64_t depth0) {
  constexpr int V = kVector<T>, kColumns = kDepthMajor ? kSide : kDepth<T>, kGroups = kColumns / V;
  const int64_t row0 = kDepthMajor ? depth0 : outer0, rows = kDepthMajor ? m.depth : m.outer;
  const int64_t column0 = kDepthMajor ? outer0 : depth0, columns = kDepthMajor ? m.outer : m.depth;
#pragma unroll
  for (int i = 0; i < kSide * kDepth<T> / V / kThreads; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x), r = at / kGroups, c = at % kGroups * V;
    const int64_t row = row0 + r, column = column0 + c;
    T* to = tile + r * kPitch<T, kDepthMajor> + c;
    const T* from = m.data;
    if (row < rows) {
      const int64_t offset = (m.rows ? m.rows[row] : row) * m.stride + column;
      from += BUG("linear_cross_entropy.offsets_of_32_bits") ? static_cast<unsigned>(offset) : offset;
    }
    if (row >= rows || column >= columns) {
      if (BUG("linear_cross_entropy.global_store")) {
        store(to, Vector<T, V>{});
      } else if (!BUG("linear_cross_entropy.stale_tail")) {
        ptx::store_shared16(to, {});
      }
    } else if (m.aligned && column + V <= columns) {
      ptx::cp_async16(to, from, true);
    } else {
      for (int j = 0; j < V; ++j) to[j] = column + j < columns ? from[j] : from_float<T>(0);
    }
  }
}

// What a thread holds of a 64 × 64 square: at[mi][ni][2 h + e] is at row(mi, h), column(ni, e), as mma has it.
struct Square {
  float at[2][4][4];
  __device__ static int row(int mi, int h) { return threadIdx.x / 64 * 32 + mi * 16 + h * 8 + threadIdx.x % 32 / 4; }
  __device__ static int column(int ni, int e) { return threadIdx.x / 32 % 2 * 32 + ni * 8 + threadIdx.x % 4 * 2 + e; }
};

template <class T, bool kMajorA, bool kMajorB>
__device__ __forceinline__ void multiply_tile(Square& sum, const T* a, const T* b) {
  constexpr int A = kPitch<T, kMajorA>, B = kPitch<T, kMajorB>;
  if constexpr (sizeof(T) == 4) {
    for (int k = 0; k < kDepth<T>; ++k) {
      float left[2][2], right[4][2];
      for (int i = 0; i < 4; ++i) {
        const int row = Square::row(i / 2, i % 2);
        left[i / 2][i % 2] = a[kMajorA ? k * A + row : row * A + k];
      }
      for (int i = 0; i < 8; ++i) {
        const int column = Square::column(i / 2, i % 2);
        right[i / 2][i % 2] = b[kMajorB ? k * B + column : column * B + k];
      }
#pragma unroll
      for (int i = 0; i < 32; ++i)
        sum.at[i / 16][i / 4 % 4][i % 4] += left[i / 16][i / 2 % 2] * right[i / 4 % 4][i % 2];
    }
  } else {
    const int lane = threadIdx.x % 32, q = lane / 8, r = lane % 8;  // this lane names row r of ldmatrix's matrix q
    const int first_row = threadIdx.x / 64 * 32, first_column = threadIdx.x / 32 % 2 * 32;
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 16) {
      unsigned left[2][4], right[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + i * 16 + q % 2 * 8, depth_a = k + q / 2 * 8;
        const int column = first_column + i * 16 + q / 2 * 8, depth_b = k + q % 2 * 8;
        if constexpr (kMajorA) {
          ptx::ldmatrix_x4_trans(left[i], a + (depth_a + r) * A + row);
        } else {
          ptx::ldmatrix_x4(left[i], a + (row + r) * A + depth_a);
        }
        if constexpr (kMajorB) {
          ptx::ldmatrix_x4_trans(right[i], b + (depth_b + r) * B + column);
        } else {
          ptx::ldmatrix_x4(right[i], b + (column + r) * B + depth_b);
        }
      }
      const int low = BUG("linear_cross_entropy.fragment") ? 1 : 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const unsigned* pair = right[i % 4 / 2] + i % 2 * 2;
        ptx::mma_16x8x16<T>(sum.at[i / 4][i % 4], left[i / 4], pair[low], pair[1 - low]);
      }
    }
  }
}

// The square at (a0, b0) of a · bᵀ.
template <class T, bool kMajorA, bool kMajorB>
__device__ __forceinline__ Square multiply(const Operand<T>& a, int64_t a0, const Operand<T>& b, int64_t b0) {
  constexpr int kTile = kTileBytes / sizeof(T);
  DYN_SHARED(T, tiles);  // (2, 2, kTile)
  Square sum{};
  const auto begin = [&](int64_t depth) {
    T* to = tiles + depth / kDepth<T> % 2 * 2 * kTile;
    fetch<T, kMajorA>(to, a, a0, depth);
    fetch<T, kMajorB>(to + kTile, b, b0, depth);
    ptx::cp_async_commit();
  };
  begin(0);
  for (int64_t depth = 0; depth < a.depth; depth += kDepth<T>) {
    const bool more = depth + kDepth<T> < a.depth;
    if (more) begin(depth + kDepth<T>);
    if (more || BUG("linear_cross_entropy.wait_count")) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    if (!BUG("linear_cross_entropy.no_barrier")) __syncthreads();
    const T* here = tiles + depth / kDepth<T> % 2 * 2 * kTile;
    multiply_tile<T, kMajorA, kMajorB>(sum, here, here + kTile);
    if (!BUG("linear_cross_entropy.no_second_barrier")) __syncthreads();  // the tile is free again
  }
  return sum;
}

__device__ __forceinline__ float scale_of(const Args& a) {
  const int64_t count = BUG("linear_cross_entropy.mean_of_all") ? a.rows : *a.count;
  return a.mean && count ? 1.0f / static_cast<float>(count) : 1.0f;
}

// The logits of the rows that count from row0 and the words from word0 on.
template <class T>
__device__ __forceinline__ Square logits(const Args& a, int64_t row0, int64_t word0) {
  const Operand<T> x{static_cast<const T*>(a.x), a.dim, a.kept, *a.count, a.dim};
  const Operand<T> weight{static_cast<const T*>(a.weight), a.dim, nullptr, a.vocab, a.dim};
  return multiply<T, false, false>(x, row0, weight, word0);
}

constexpr int kListThreads = 256;

// One block: kept, place, count. A target outside of the vocabulary leaves a NaN where its logit would be.
__global__ void __launch_bounds__(kListThreads) find_kept(Args a) {
  SHARED(int, counts, [kListThreads / 32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t before = 0;
  for (int64_t first = 0; first < a.rows; first += kListThreads) {
    const int64_t row = first + threadIdx.x, target = row < a.rows ? a.targets[row] : a.ignore_index;
    const unsigned votes = __ballot_sync(0xffffffffu, target != a.ignore_index);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int64_t at = before + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kListThreads / 32; ++w) {
      if (w < warp) at += counts[w];
      before += counts[w];
    }
    if (target != a.ignore_index) {
      a.kept[at] = row;
      const bool outside = target < 0 || target >= a.vocab;
      if (outside) a.per_row[at] = BUG("linear_cross_entropy.no_nan") ? 0 : NAN;
    }
    if (row < a.rows) a.place[row] = target == a.ignore_index ? -1 : at;
    __syncthreads();
  }
  if (threadIdx.x == 0) *a.count = before;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) statistics(Args a) {
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kSide, count = *a.count;
  if (row0 >= count) return;
  int64_t target[4];
  float top[4], sum[4];  // of this thread's columns so far
  for (int i = 0; i < 4; ++i) {
    const int64_t row = row0 + Square::row(i / 2, i % 2);
    target[i] = row < count ? a.targets[a.kept[row]] : -1;
    top[i] = kLowest, sum[i] = 0;
  }
  const int64_t squares = ceil_div(a.vocab, kSide), each = ceil_div(squares, gridDim.y), first = blockIdx.y * each;
  for (int64_t at = first; at < squares && at < first + each; ++at) {
    Square l = logits<T>(a, row0, at * kSide);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float highest = top[i], added = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float& value = l.at[i / 2][j / 2][i % 2 * 2 + j % 2];
        const int64_t word = at * kSide + Square::column(j / 2, j % 2);
        if (word == target[i] && word < a.vocab) a.per_row[row0 + Square::row(i / 2, i % 2)] = value;
        if (word >= a.vocab && !BUG("linear_cross_entropy.no_mask")) value = -INFINITY;
        highest = fmaxf(highest, value);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) added += __expf(l.at[i / 2][j / 2][i % 2 * 2 + j % 2] - highest);
      sum[i] = (BUG("linear_cross_entropy.no_rescale") ? sum[i] : sum[i] * __expf(top[i] - highest)) + added;
      top[i] = highest;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float highest =
        fmaxf(fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 1)),
              fmaxf(__shfl_xor_sync(0xffffffffu, top[i], 2), __shfl_xor_sync(0xffffffffu, top[i], 3)));
    float total = sum[i] * __expf(top[i] - highest);
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int64_t row = row0 + Square::row(i / 2, i % 2);
    if (threadIdx.x % 4 == 0 && row < count) {
      const int64_t part = 2 * blockIdx.y + threadIdx.x / 32 % 2;
      a.tops[part * a.rows + row] = highest;
      a.sums[part * a.rows + row] = total;
    }
  }
}

__global__ void __launch_bounds__(kThreads) join_parts(Args a, int64_t parts) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= *a.count) return;
  float top = kLowest;
  for (int64_t i = 0; i < parts; ++i) top = fmaxf(top, a.tops[i * a.rows + row]);
  double total = 0;
  for (int64_t i = 0; i < parts; ++i) total += a.sums[i * a.rows + row] * __expf(a.tops[i * a.rows + row] - top);
  const auto log_sum = static_cast<float>(log(total));
  const float lse = top + log_sum;
  a.per_row[a.rows + row] = top;
  a.per_row[2 * a.rows + row] = static_cast<float>((1 + 2.0 * a.z_loss * lse) / total);
  a.per_row[3 * a.rows + row] = (top - a.per_row[row]) + log_sum + a.z_loss * lse * lse;
}

__global__ void __launch_bounds__(kThreads) add_losses(Args a) {  // one block
  SHARED(double, sums, [kThreads]);
  double sum = 0;
  for (int64_t row = threadIdx.x; row < *a.count; row += kThreads) sum += a.per_row[3 * a.rows + row];
  sums[threadIdx.x] = sum;
  for (unsigned width = kThreads / 2; width; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
  }
  if (threadIdx.x == 0) *a.loss = static_cast<float>(sums[0] * scale_of(a));
}

// The tile of words from `first` on and the chunk of rows from `start` on.
struct Cut {
  int64_t first, words, pitch, start;

  template <class T>
  __device__ Operand<T> dlogits(const Args& a, bool depth_major) const {
    const int64_t left = *a.count - start, rows = left < 0 ? 0 : left < Args::chunk ? left : Args::chunk;
    return {static_cast<const T*>(a.dlogits), pitch, nullptr, depth_major ? words : rows, depth_major ? rows : words};
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) make_dlogits(Args a, Cut cut) {
  const int64_t row0 = cut.start + blockIdx.y * kSide, word0 = cut.first + blockIdx.x * kSide, count = *a.count;
  if (row0 >= count) return;
  const Square l = logits<T>(a, row0, word0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = row0 + Square::row(i / 2, i % 2);
    if (row >= count) continue;
    const float top = a.per_row[a.rows + row], factor = a.per_row[2 * a.rows + row];
    const int64_t target = a.targets[a.kept[row]];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t word = word0 + Square::column(j, 0);
      Vector<T, 2> pair;
      for (int e = 0; e < 2; ++e) {
        const float p = __expf(l.at[i / 2][j][i % 2 * 2 + e] - top) * factor;
        pair.at[e] = from_float<T>(word + e < a.vocab ? p - (word + e == target ? 1.0f : 0.0f) : 0.0f);
      }
      store(static_cast<T*>(a.dlogits) + (row - cut.start) * cut.pitch + word - cut.first, pair);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) multiply_dx(Args a, Cut cut) {
  const int64_t row0 = blockIdx.y * kSide, column0 = blockIdx.x * kSide;
  const auto d = cut.dlogits<T>(a, false);
  if (row0 >= d.outer) return;
  const Operand<T> weight{static_cast<const T*>(a.weight) + cut.first * a.dim, a.dim, nullptr, a.dim, cut.words};
  const Square sum = multiply<T, false, true>(d, row0, weight, column0);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int64_t row = row0 + Square::row(i / 16, i / 2 % 2), column = column0 + Square::column(i / 4 % 4, i % 2);
    if (row >= d.outer || column >= a.dim) continue;
    float& out = a.dx_sum[(cut.start + row) * a.dim + column];
    const float value = sum.at[i / 16][i / 4 % 4][i % 4];
    out = cut.first && !BUG("linear_cross_entropy.overwrite") ? out + value : value;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) multiply_dweight(Args a, Cut cut) {
  const int64_t word0 = blockIdx.y * kSide, column0 = blockIdx.x * kSide;
  const auto d = cut.dlogits<T>(a, true);
  const Operand<T> x{static_cast<const T*>(a.x), a.dim, a.kept + cut.start, a.dim, d.depth};
  const Square sum = multiply<T, true, true>(d, word0, x, column0);
  const bool last = cut.start + Args::chunk >= a.rows;
  const float scale = scale_of(a);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int64_t word = word0 + Square::row(i / 16, i / 2 % 2), column = column0 + Square::column(i / 4 % 4, i % 2);
    if (word >= cut.words || column >= a.dim) continue;
    float value = sum.at[i / 16][i / 4 % 4][i % 4];
    if (cut.start) value += a.dweight_sum[word * a.dim + column];
    if (last) {
      static_cast<T*>(a.dweight)[(cut.first + word) * a.dim + column] = from_float<T>(value * scale);
    } else {
      a.dweight_sum[word * a.dim + column] = value;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) spread_dx(Args a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= a.rows * a.dim) return;
  const int64_t place = a.place[at / a.dim];
  const float value = place < 0 ? 0 : a.dx_sum[place * a.dim + at % a.dim] * scale_of(a);
  static_cast<T*>(a.dx)[at] = from_float<T>(value);
}

unsigned grid_of(int64_t n, int64_t each) { return static_cast<unsigned>(ceil_div(n, each)); }

template <class T>
Status run_all(const Args& a, void* stream) {
  constexpr size_t kShared = 4 * kTileBytes;
  const dim3 block(kThreads);
  Status status = Status::ok;
  const auto step = [&](auto* kernel, dim3 grid, size_t shared, auto... args) {
    if (status == Status::ok) status = launch(kernel, grid, block, shared, stream, a, args...);
  };
  status = launch(find_kept, dim3(1), dim3(kListThreads), 0, stream, a);
  step(statistics<T>, dim3(grid_of(a.rows, kSide), static_cast<unsigned>(a.splits())), kShared);
  step(join_parts, dim3(grid_of(a.rows, kThreads)), 0, a.parts());
  step(add_losses, dim3(1), 0);
  if (!a.dim || (!a.dx && !a.dweight)) return status;
  for (int64_t first = 0; first < a.vocab; first += Args::tile) {
    const int64_t words = a.vocab - first < Args::tile ? a.vocab - first : Args::tile;
    for (int64_t start = 0; start < a.rows; start += Args::chunk) {
      const int64_t rows = a.rows - start < Args::chunk ? a.rows - start : Args::chunk;
      const Cut cut{first, words, a.tile_here(), start};
      step(make_dlogits<T>, dim3(grid_of(words, kSide), grid_of(rows, kSide)), kShared, cut);
      if (a.dx) step(multiply_dx<T>, dim3(grid_of(a.dim, kSide), grid_of(rows, kSide)), kShared, cut);
      if (a.dweight) step(multiply_dweight<T>, dim3(grid_of(a.dim, kSide), grid_of(words, kSide)), kShared, cut);
    }
  }
  if (a.dx) step(spread_dx<T>, dim3(grid_of(a.rows * a.dim, kThreads)), 0);
  return status;
}

}  // namespace

template <>
Status launch_cuda(const LinearCrossEntropy& a, void* stream) {
  if (!a.rows) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) { return run_all<decltype(t)>(a, stream); });
}

}  // namespace finetune
