// Projection onto the vocabulary and cross-entropy with z-loss, without the logits (Cut Cross-Entropy, Wijmans et al.
// 2024, arXiv:2411.09009; online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867). With L = x · Wᵀ:
//   lse = log Σ exp(l_j),   loss = lse − l_t + z · lse²,   d loss / d l_j = softmax(l)_j · (1 + 2 z lse) − [j = t] =
//   D_j, dx = D · W,   dW = Dᵀ · x.
//
//   1. find_kept     the rows that count, as a list: the others are never multiplied
//   2. statistics    a block makes 128 × 128 squares of L along its part of the vocabulary and keeps, in registers,
//   each
//                    row's running maximum m and sum of exponentials l; the target's logit is stored where it passes by
//   3. join_parts, add_losses
//   4. for each tile of 4096 words and chunk of 4096 rows: make_dlogits makes the tile's logits again, to the same
//   bits,
//      and from them D (32 MB in 16 bits); multiply_dx and multiply_dweight add its products in fp32
//   5. spread_dx     to the places of the rows that count, rounded once
// Sums go in a fixed order, without atomics. The number of rows that count stays on the device, and scales the ends.
//
// All four products are one function: tiles of 128 × 64 bytes through cp.async, three stages, rows padded by 16 bytes
// (so that ldmatrix meets no bank twice), 4 warps of 64 × 64 outputs each, mma m16n8k16 for 16-bit elements; fp32 by
// fused multiply-adds in the same fragments. FLOPs: 2 · N · V · C forward, three times that backward. DRAM sees W once
// per chunk: compute and L2 are the roofs. Of a warp's step of 16 terms, with 16 bits:
//                                             64 × 64 squares, two stages      128 × 128, three stages
//   FLOPs a byte of L2 (cp.async)                        32                              64
//   FLOPs a byte of shared memory (ldmatrix)             16                              32
//   mma, ldmatrix in a step of 32 terms               16, 8                          64, 16
//   barriers in it                                        2                               1
//   shared memory, blocks of an A100's multiprocessor  20 KiB, 4 to 7                60 KiB, 2
//   chunks of 1024 rows, for each dW and its fp32 sum go to DRAM and back; now of 4096
// An A100's multiprocessor makes 2048 FLOPs in the time of 128 bytes of shared memory, so 16 a byte, without anything
// else, was its roof.
#include "finetune/linear_cross_entropy.h"

#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

using Args = LinearCrossEntropy;
constexpr int kThreads = 128, kSide = Args::side, kStages = 3;
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

  __device__ const T* row(int64_t i) const {
    const int64_t offset = (rows ? rows[i] : i) * stride;
    return data + offset;
  }
};

// A thread's share of the copies of an operand's tiles at `outer0`: 16 bytes of each of four rows, zeros where the
// matrix ends. The rows of an (outer, depth) matrix stay the same for all tiles, so their addresses are kept.
template <class T, bool kDepthMajor>
struct Loader {
  static constexpr int V = kVector<T>, kGroups = (kDepthMajor ? kSide : kDepth<T>) / V;
  static constexpr int kCopies = kSide * kDepth<T> / V / kThreads, kRowsApart = kThreads / kGroups;
  Operand<T> m;
  int64_t outer0;
  bool aligned;
  const T* rows[kDepthMajor ? 1 : kCopies];

  __device__ static int row() { return threadIdx.x / kGroups; }
  __device__ static int column() { return threadIdx.x % kGroups * V; }

  __device__ __forceinline__ Loader(const Operand<T>& m_, int64_t outer0_) : m(m_), outer0(outer0_) {
    aligned = m.stride % V == 0 && are_aligned(m.data);
    if constexpr (!kDepthMajor) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int64_t at = outer0 + row() + i * kRowsApart;
        rows[i] = at < m.outer ? m.row(at) : nullptr;
      }
    }
  }

  __device__ __forceinline__ void load(T* tile, int64_t depth0) const {
    const int64_t at = (kDepthMajor ? outer0 : depth0) + column();
    const int left = static_cast<int>(max(min((kDepthMajor ? m.outer : m.depth) - at, int64_t{V}), int64_t{0}));
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      T* const to = tile + (row() + i * kRowsApart) * kPitch<T, kDepthMajor> + column();
      const T* from;
      if constexpr (kDepthMajor) {
        const int64_t depth = depth0 + row() + i * kRowsApart;
        from = depth < m.depth ? m.row(depth) : nullptr;
      } else {
        from = rows[i];
      }
      if (!from || left == 0) {
        ptx::store_shared16(to, {});
      } else if (aligned && left == V) {
        ptx::cp_async16(to, from + at, true);
      } else {
#pragma unroll 1
        for (int j = 0; j < V; ++j) to[j] = j < left ? from[at + j] : from_float<T>(0);
      }
    }
  }
};

// A thread's part of a 128 × 128 square: at[mi][ni][2 h + e] is at row(mi, h), column(ni, e), as mma has it. A warp has
// a quarter of 64 × 64.
struct Square {
  static constexpr int kRows = 8, kColumns = 16;  // that a thread has a part in
  float d[4][8][4];
  __device__ float& at(int i, int j) { return d[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  __device__ float at(int i, int j) const { return d[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  __device__ static int row(int i) { return threadIdx.x / 64 * 64 + i * 8 + threadIdx.x % 32 / 4; }
  __device__ static int column(int j) { return threadIdx.x / 32 % 2 * 64 + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }
};

template <class T, bool kMajorA, bool kMajorB>
__device__ __forceinline__ void multiply_tile(Square& sum, const T* a, const T* b) {
  constexpr int A = kPitch<T, kMajorA>, B = kPitch<T, kMajorB>;
  if constexpr (sizeof(T) == 4) {
#pragma unroll 1
    for (int k = 0; k < kDepth<T>; ++k) {
      float left[Square::kRows];
#pragma unroll
      for (int i = 0; i < Square::kRows; ++i) left[i] = a[kMajorA ? k * A + Square::row(i) : Square::row(i) * A + k];
#pragma unroll
      for (int j = 0; j < Square::kColumns; ++j) {
        const float right = b[kMajorB ? k * B + Square::column(j) : Square::column(j) * B + k];
#pragma unroll
        for (int i = 0; i < Square::kRows; ++i) sum.at(i, j) += left[i] * right;
      }
    }
  } else {
    const int lane = threadIdx.x % 32, q = lane / 8, r = lane % 8;  // this lane names row r of ldmatrix's matrix q
    const int first_row = threadIdx.x / 64 * 64, first_column = threadIdx.x / 32 % 2 * 64;
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 16) {
      unsigned left[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + i * 16 + q % 2 * 8, depth = k + q / 2 * 8;
        if constexpr (kMajorA) {
          ptx::ldmatrix_x4_trans(left[i], a + (depth + r) * A + row);
        } else {
          ptx::ldmatrix_x4(left[i], a + (row + r) * A + depth);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        unsigned right[4];
        const int column = first_column + j * 16 + q / 2 * 8, depth = k + q % 2 * 8;
        if constexpr (kMajorB) {
          ptx::ldmatrix_x4_trans(right, b + (depth + r) * B + column);
        } else {
          ptx::ldmatrix_x4(right, b + (column + r) * B + depth);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ptx::mma_16x8x16<T>(sum.d[i][2 * j], left[i], right[0], right[1]);
          ptx::mma_16x8x16<T>(sum.d[i][2 * j + 1], left[i], right[2], right[3]);
        }
      }
    }
  }
}

// The square at (a0, b0) of a · bᵀ. Copies run two tiles ahead; one barrier a tile serves twice: all threads' copies of
// this one have arrived, and nobody reads the tile any more that the next copies overwrite.
template <class T, bool kMajorA, bool kMajorB>
__device__ __forceinline__ Square multiply(const Operand<T>& a, int64_t a0, const Operand<T>& b, int64_t b0) {
  constexpr int kTile = kTileBytes / sizeof(T);
  DYN_SHARED(T, tiles);  // (kStages, 2, kTile)
  const Loader<T, kMajorA> left(a, a0);
  const Loader<T, kMajorB> right(b, b0);
  Square sum{};
  const int steps = static_cast<int>(ceil_div(a.depth, kDepth<T>));
  const auto begin = [&](int step, int stage) {
    if (step < steps) {
      T* const to = tiles + stage * 2 * kTile;
      left.load(to, int64_t{step} * kDepth<T>);
      right.load(to + kTile, int64_t{step} * kDepth<T>);
    }
    ptx::cp_async_commit();  // even if it is empty: the wait counts groups
  };
  __syncthreads();  // the last square's tiles are read
  for (int i = 0; i < kStages - 1; ++i) begin(i, i);
  int here = 0, ahead = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    begin(step + kStages - 1, ahead);
    const T* const tile = tiles + here * 2 * kTile;
    multiply_tile<T, kMajorA, kMajorB>(sum, tile, tile + kTile);
    here = here == kStages - 1 ? 0 : here + 1;
    ahead = ahead == kStages - 1 ? 0 : ahead + 1;
  }
  return sum;
}

__device__ __forceinline__ float scale_of(const Args& a) {
  const int64_t count = *a.count;
  return a.mean && count ? 1.0f / static_cast<float>(count) : 1.0f;
}

// The logits of the rows that count from row0 and the words from word0 on.
template <class T>
__device__ __forceinline__ Square logits(const Args& a, int64_t row0, int64_t word0) {
  const Operand<T> x{static_cast<const T*>(a.x), a.dim, a.kept, *a.count, a.dim};
  const Operand<T> weight{static_cast<const T*>(a.weight), a.dim, nullptr, a.vocab, a.dim};
  return multiply<T, false, false>(x, row0, weight, word0);
}

// The target of a row that counts; −1 where it is outside of the vocabulary.
__device__ __forceinline__ int word_of(const Args& a, int64_t row) {
  const int64_t target = a.targets[a.kept[row]];
  return target < 0 || target >= a.vocab ? -1 : static_cast<int>(target);
}

constexpr int kListThreads = 256;

// e^x; what would be subnormal is 0, which saves four instructions of __expf's seven.
__device__ __forceinline__ float exponential(float x) { return ptx::exp2(x * 1.44269504088896f); }

// Of a square's columns, those of no word get the weight 0. Only the vocabulary's last square has such.
__device__ __forceinline__ void hide_past_the_end(Square& s, int words) {
  if (words >= kSide) return;
#pragma unroll
  for (int j = 0; j < Square::kColumns; ++j) {
#pragma unroll
    for (int i = 0; i < Square::kRows; ++i) {
      if (Square::column(j) >= words) s.at(i, j) = -INFINITY;
    }
  }
}

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
      if (outside) a.per_row[at] = NAN;
    }
    if (row < a.rows) a.place[row] = target == a.ignore_index ? -1 : at;
    __syncthreads();
  }
  if (threadIdx.x == 0) *a.count = before;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) statistics(Args a) {
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kSide, count = *a.count;
  if (row0 >= count) return;
  float m[Square::kRows], l[Square::kRows];  // of this thread's columns so far
#pragma unroll
  for (int i = 0; i < Square::kRows; ++i) m[i] = kLowest, l[i] = 0;
  const int64_t squares = ceil_div(a.vocab, kSide), each = ceil_div(squares, gridDim.y), first = blockIdx.y * each;
#pragma unroll 1
  for (int64_t at = first; at < squares && at < first + each; ++at) {
    Square s = logits<T>(a, row0, at * kSide);
    const int word0 = static_cast<int>(at) * kSide, words = static_cast<int>(a.vocab) - word0;
#pragma unroll
    for (int i = 0; i < Square::kRows; ++i) {
      const int64_t row = row0 + Square::row(i);
      const int target = row < count ? word_of(a, row) : -1, hit = target - word0;  // read again: registers are short
      if (target < 0 || hit < 0 || hit >= kSide) continue;                          // nearly always
      float value = 0;
      bool mine = false;
#pragma unroll
      for (int j = 0; j < Square::kColumns; ++j) {
        if (Square::column(j) == hit) value = s.at(i, j), mine = true;
      }
      if (mine) a.per_row[row] = value;
    }
    hide_past_the_end(s, words);
#pragma unroll
    for (int i = 0; i < Square::kRows; ++i) {
      float highest = m[i], added = 0;
#pragma unroll
      for (int j = 0; j < Square::kColumns; ++j) highest = fmaxf(highest, s.at(i, j));
#pragma unroll
      for (int j = 0; j < Square::kColumns; ++j) added += exponential(s.at(i, j) - highest);
      l[i] = l[i] * exponential(m[i] - highest) + added;
      m[i] = highest;
    }
  }
#pragma unroll
  for (int i = 0; i < Square::kRows; ++i) {
    const float highest = fmaxf(fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 1)),
                                fmaxf(__shfl_xor_sync(0xffffffffu, m[i], 2), __shfl_xor_sync(0xffffffffu, m[i], 3)));
    float sum = l[i] * exponential(m[i] - highest);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const int64_t row = row0 + Square::row(i);
    if (threadIdx.x % 4 == 0 && row < count) {
      const int64_t part = 2 * blockIdx.y + threadIdx.x / 32 % 2;
      a.part_m[part * a.rows + row] = highest;
      a.part_l[part * a.rows + row] = sum;
    }
  }
}

__global__ void __launch_bounds__(kThreads) join_parts(Args a, int64_t parts) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= *a.count) return;
  float m = kLowest;
  for (int64_t i = 0; i < parts; ++i) m = fmaxf(m, a.part_m[i * a.rows + row]);
  double l = 0;
  for (int64_t i = 0; i < parts; ++i) l += a.part_l[i * a.rows + row] * exponential(a.part_m[i * a.rows + row] - m);
  const auto log_l = static_cast<float>(log(l));
  const float lse = m + log_l;
  a.per_row[a.rows + row] = m;
  a.per_row[2 * a.rows + row] = static_cast<float>((1 + 2.0 * a.z_loss * lse) / l);
  a.per_row[3 * a.rows + row] = (m - a.per_row[row]) + log_l + a.z_loss * lse * lse;
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
__global__ void __launch_bounds__(kThreads, 2) make_dlogits(Args a, Cut cut) {
  const int64_t row0 = cut.start + blockIdx.y * kSide, word0 = cut.first + blockIdx.x * kSide, count = *a.count;
  if (row0 >= count) return;
  Square s = logits<T>(a, row0, word0);
  hide_past_the_end(s, static_cast<int>(min(a.vocab - word0, int64_t{kSide})));
#pragma unroll
  for (int i = 0; i < Square::kRows; ++i) {
    const int64_t row = row0 + Square::row(i);
    if (row >= count) continue;
    const float m = a.per_row[a.rows + row], factor = a.per_row[2 * a.rows + row];
#pragma unroll
    for (int j = 0; j < Square::kColumns; ++j) s.at(i, j) = exponential(s.at(i, j) - m) * factor;
    const int target = word_of(a, row), hit = target - static_cast<int>(word0);
    if (target >= 0 && hit >= 0 && hit < kSide) {  // seldom
#pragma unroll
      for (int j = 0; j < Square::kColumns; ++j) s.at(i, j) -= Square::column(j) == hit ? 1.0f : 0.0f;
    }
    T* const to = static_cast<T*>(a.dlogits) + (row - cut.start) * cut.pitch + (word0 - cut.first);
#pragma unroll
    for (int j = 0; j < Square::kColumns; j += 2) {
      const Vector<T, 2> pair{from_float<T>(s.at(i, j)), from_float<T>(s.at(i, j + 1))};
      store(to + Square::column(j), pair);
    }
  }
}

// Of one of gridDim.z parts of the tile's words: few rows would not fill a GPU otherwise.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) multiply_dx(Args a, Cut cut) {
  const int64_t row0 = blockIdx.y * kSide, column0 = blockIdx.x * kSide;
  auto d = cut.dlogits<T>(a, false);
  if (row0 >= d.outer) return;
  const int64_t each = ceil_div(ceil_div(cut.words, kDepth<T>), gridDim.z) * kDepth<T>, begin = blockIdx.z * each;
  d.depth = max(min(cut.words - begin, each), int64_t{0});
  d.data += begin;
  const Operand<T> weight{static_cast<const T*>(a.weight) + (cut.first + begin) * a.dim, a.dim, nullptr, a.dim,
                          d.depth};
  const Square sum = multiply<T, false, true>(d, row0, weight, column0);
#pragma unroll
  for (int i = 0; i < Square::kRows; ++i) {
    const int64_t row = row0 + Square::row(i);
    if (row >= d.outer) continue;
    float* const to = a.dx_sum + ((blockIdx.z * a.rows + cut.start + row) * a.dim + column0);
#pragma unroll
    for (int j = 0; j < Square::kColumns; ++j) {
      const int column = Square::column(j);
      if (column0 + column >= a.dim) continue;
      const float before = cut.first ? to[column] : 0.0f;
      to[column] = before + sum.at(i, j);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) multiply_dweight(Args a, Cut cut) {
  const int64_t word0 = blockIdx.y * kSide, column0 = blockIdx.x * kSide;
  const auto d = cut.dlogits<T>(a, true);
  const Operand<T> x{static_cast<const T*>(a.x), a.dim, a.kept + cut.start, a.dim, d.depth};
  const Square sum = multiply<T, true, true>(d, word0, x, column0);
  const bool last = cut.start + Args::chunk >= a.rows;
  const float scale = scale_of(a);
#pragma unroll
  for (int i = 0; i < Square::kRows; ++i) {
    const int64_t word = word0 + Square::row(i);
    if (word >= cut.words) continue;
#pragma unroll
    for (int j = 0; j < Square::kColumns; ++j) {
      const int64_t column = column0 + Square::column(j);
      if (column >= a.dim) continue;
      float value = sum.at(i, j);
      if (cut.start) value += a.dweight_sum[word * a.dim + column];
      if (last) {
        static_cast<T*>(a.dweight)[(cut.first + word) * a.dim + column] = from_float<T>(value * scale);
      } else {
        a.dweight_sum[word * a.dim + column] = value;
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) spread_dx(Args a, int64_t splits) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= a.rows * a.dim) return;
  const int64_t place = a.place[at / a.dim];
  float value = 0;
  for (int64_t i = 0; place >= 0 && i < splits; ++i) value += a.dx_sum[(i * a.rows + place) * a.dim + at % a.dim];
  static_cast<T*>(a.dx)[at] = from_float<T>(value * scale_of(a));
}

unsigned grid_of(int64_t n, int64_t each) { return static_cast<unsigned>(ceil_div(n, each)); }

template <class T>
Status run_all(const Args& a, void* stream) {
  constexpr size_t kShared = kStages * 2 * kTileBytes;
  const dim3 block(kThreads);
  const auto dx_splits = static_cast<unsigned>(a.dx_splits());
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
      if (a.dx) step(multiply_dx<T>, dim3(grid_of(a.dim, kSide), grid_of(rows, kSide), dx_splits), kShared, cut);
      if (a.dweight) step(multiply_dweight<T>, dim3(grid_of(a.dim, kSide), grid_of(words, kSide)), kShared, cut);
    }
  }
  if (a.dx) step(spread_dx<T>, dim3(grid_of(a.rows * a.dim, kThreads)), 0, a.dx_splits());
  return status;
}

}  // namespace

template <>
Status launch_cuda(const LinearCrossEntropy& a, void* stream) {
  if (!a.rows) return Status::ok;
  if (a.vocab > 0x7fffffff - kSide) return Status::unsupported;  // words are counted in int
  return for_dtype(a.dtype, [&](auto t) { return run_all<decltype(t)>(a, stream); });
}

}  // namespace finetune
