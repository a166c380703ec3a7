// Products of small matrices by one warp, for attention's kernels: on tensor cores (bf16, f16) and without (f32). Both
// forms of Warp<T, D> have
//   kRows        rows of its matrices that a lane has a part in; kWarpRows rows of the warp
//   kBlockRows   rows of the tiles that a block holds: 4 warps'
//   kStep        rows of the tiles that it loops over, forward; kBackwardStep backward
//   Matrix<N>    (kWarpRows, N) fp32 in registers; at(r, c): the lane's element in row row(r), column column(c)
//   multiply     matrix = left · rightᵀ over the D columns of two tiles
//   accumulate   acc += matrix · right
//   kDiagonal    rows of `right` from diagonal() on that have the warp's own rows' numbers among them
//   to_shared    the matrix to a tile; store_row: a row of it to global memory
//   over_row     joins a value of each of the lanes that share a row
#pragma once

#include "attention_common.cuh"

namespace finetune::attention {

template <class T, int D>
struct Warp {
  static_assert(sizeof(T) == 2);
  static constexpr int kStages = 2, kRows = 2, kWarpRows = 16, kBlockRows = kWarps * kWarpRows;
  static constexpr int kStep = D <= 128 ? 64 : 32, kBackwardStep = D <= 64 ? 64 : D == 128 ? 32 : 16;
  static constexpr int kKeyColumns = D <= 128 ? D : 128;  // of dK and dV that a block can hold in registers
  static constexpr int kScratch = 0;                      // bytes of shared memory

  // mma's layout of its result, 16×8 after 16×8 (see ptx.cuh).
  template <int N>
  struct Matrix {
    static constexpr int kColumns = N / 4;
    float d[N / 8][4] = {};
    __device__ float& at(int r, int c) { return d[c / 2][2 * r + c % 2]; }
  };

  static constexpr int kDiagonal = 16;

  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kWarpRows;
  __device__ explicit Warp(unsigned char*) {}
  __device__ int diagonal() const { return first; }

  __device__ int row(int r) const { return first + lane / 4 + 8 * r; }
  __device__ int column(int c) const { return c / 2 * 8 + lane % 4 * 2 + c % 2; }

  template <class F>
  __device__ float over_row(float v, F&& join) const {
    v = join(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return join(v, __shfl_xor_sync(0xffffffffu, v, 2));
  }

  template <int N>
  __device__ void multiply(Tile<T, D> left, Tile<T, D> right, Matrix<N>& s) const {
    s = {};
#pragma unroll 4  // eight chunks, the swizzle's period: the next four steps' addresses are these, so much further on
    for (int k = 0; k < D / 16; ++k) {
      unsigned a[4], b[4];
      ptx::ldmatrix_x4(a, left.read(first + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int j = 0; j < N / 16; ++j) {  // a row of `right` is a column of b
        ptx::ldmatrix_x4(b, right.read(16 * j + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        ptx::mma_16x8x16<T>(s.d[2 * j], a, b[0], b[1]);
        ptx::mma_16x8x16<T>(s.d[2 * j + 1], a, b[2], b[3]);
      }
    }
  }

  // Columns [begin, begin + C) of `right`. What mma gives as a result it takes as an operand: two 16×8 make a 16×16.
  template <int N, int C>
  __device__ void accumulate(Matrix<N>& p, Tile<T, D> right, int begin, Matrix<C>& acc) const {
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      const float (&first)[4] = p.d[2 * k], (&second)[4] = p.d[2 * k + 1];
      const unsigned a[4] = {ptx::pack<T>(first[0], first[1]), ptx::pack<T>(first[2], first[3]),
                             ptx::pack<T>(second[0], second[1]), ptx::pack<T>(second[2], second[3])};
#pragma unroll
      for (int j = 0; j < C / 16; ++j) {
        unsigned b[4];
        const int chunk = begin / 8 + 2 * j + lane / 16;
        ptx::ldmatrix_x4_trans(b, right.read(16 * k + lane % 16, chunk));
        ptx::mma_16x8x16<T>(acc.d[2 * j], a, b[0], b[1]);
        ptx::mma_16x8x16<T>(acc.d[2 * j + 1], a, b[2], b[3]);
      }
    }
  }

  // Row r of the matrix to global memory, where D floats have place.
  __device__ void store_row(Matrix<D>& x, int r, float* to) const {
#pragma unroll
    for (int c = 0; c < x.kColumns; c += 2) {
      finetune::store(to + column(c), Vector<float, 2>{x.at(r, c), x.at(r, c + 1)});
    }
  }

  // Writes the matrix, times a factor per row, into columns [begin, begin + N) of the warp's rows of a tile.
  template <int N>
  __device__ void to_shared(Matrix<N>& x, const float (&factor)[kRows], Tile<T, D> tile, int begin) const {
    __syncwarp();  // other lanes' ldmatrix read these rows
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        unsigned* const pair = reinterpret_cast<unsigned*>(tile.write(row(r), begin / 8 + j));
        pair[lane % 4] = ptx::pack<T>(x.d[j][2 * r] * factor[r], x.d[j][2 * r + 1] * factor[r]);
      }
    }
  }
};

// fp32, without tensor cores (they would round to tf32): a lane has one of 32 rows of `right`
// and, of acc, every 32nd column.
template <int D>
struct Warp<float, D> {
  static constexpr int kStages = 1, kRows = D <= 128 ? 8 : 4, kWarpRows = kRows, kBlockRows = kWarps * kWarpRows;
  static constexpr int kStep = 32, kBackwardStep = 32, kKeyColumns = D;
  static constexpr int kScratch = kBlockRows * 32 * sizeof(float);

  template <int N>
  struct Matrix {
    static constexpr int kColumns = N / 32;
    float d[kRows][kColumns] = {};
    __device__ float& at(int r, int c) { return d[r][c]; }
  };

  static constexpr int kDiagonal = 32;

  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kWarpRows;
  float* const scratch;  // (kRows, 32)
  __device__ explicit Warp(unsigned char* memory) : scratch(reinterpret_cast<float*>(memory) + first * 32) {}
  __device__ int diagonal() const { return 0; }

  __device__ int row(int r) const { return first + r; }
  __device__ int column(int c) const { return lane + 32 * c; }

  template <class F>
  __device__ float over_row(float v, F&& join) const {
    return warp_reduce(v, join);
  }

  __device__ void multiply(Tile<float, D> left, Tile<float, D> right, Matrix<32>& s) const {
    s = {};
#pragma unroll 4
    for (int chunk = 0; chunk < D / 4; ++chunk) {
      const auto b = load<float, 4>(right.read(lane, chunk));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto a = load<float, 4>(left.read(row(r), chunk));
#pragma unroll
        for (int j = 0; j < 4; ++j) s.d[r][0] += a.at[j] * b.at[j];
      }
    }
  }

  __device__ void accumulate(Matrix<32>& p, Tile<float, D> right, int, Matrix<D>& acc) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) scratch[r * 32 + lane] = p.d[r][0];
    __syncwarp();
    for (int i = 0; i < 32; i += 4) {
      Vector<float, 4> weights[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) weights[r] = load<float, 4>(scratch + r * 32 + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < D / 32; ++c) {
          const float b = *right.element(i + j, column(c));
#pragma unroll
          for (int r = 0; r < kRows; ++r) acc.d[r][c] += weights[r].at[j] * b;
        }
      }
    }
    __syncwarp();  // the next matrix overwrites this one
  }

  __device__ void store_row(Matrix<D>& x, int r, float* to) const {
#pragma unroll
    for (int c = 0; c < x.kColumns; ++c) to[column(c)] = x.at(r, c);
  }

  __device__ void to_shared(Matrix<D>& x, const float (&factor)[kRows], Tile<float, D> tile, int) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < D / 32; ++c) *tile.element(row(r), column(c)) = x.d[r][c] * factor[r];
    }
  }
};

}  // namespace finetune::attention
