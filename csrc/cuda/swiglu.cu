// SwiGLU (Shazeer 2020, arXiv:2002.05202).
//
//   forward    y = silu(g) · u,   silu(g) = g · s,   s = 1 / (1 + exp(−g))
//   backward   dg = dy · u · s · (1 + g · (1 − s)),   du = dy · g · s;   s is computed again, nothing is kept
//
// A block takes a piece of a row, a thread 16 bytes at a time where rows are aligned.
//
//               bytes an element, fp32 (16 bits)               FLOPs an element (exp counted as five)
//   forward     12 (6): reads g and u, writes y                10
//   backward    20 (10): reads g, u and dy, writes dg and du   15
//
// 1 to 2 FLOPs a byte: the roof is memory bandwidth.
#include "finetune/swiglu.h"

#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 128;
constexpr int64_t kPiece = 2048;  // elements a block

// expf, not __expf, whose error grows with the argument. An IEEE division would be a call, and spill.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// This block's piece of a row.
struct Piece {
  int64_t row, first, count;

  __device__ explicit Piece(int64_t dim) {
    const int64_t pieces = ceil_div(dim, kPiece);
    row = blockIdx.x / pieces;
    first = blockIdx.x % pieces * kPiece;
    count = dim - first < kPiece ? dim - first : kPiece;
  }
};

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) forward(Swiglu a) {
  const Piece p(a.dim);
  const T *gate = static_cast<const T*>(a.gate) + p.row * a.gate_stride + p.first,
          *up = static_cast<const T*>(a.up) + p.row * a.up_stride + p.first;
  T* y = static_cast<T*>(a.y) + p.row * a.dim + p.first;
  for_each_group<kVector<T>>(p.count, are_aligned(gate, up, y), [&]<int N>(int64_t i) {
    const auto gs = load<T, N>(gate + i), us = load<T, N>(up + i);
    Vector<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float g = to_float(gs.at[j]);
      out.at[j] = from_float<T>(g * sigmoid(g) * to_float(us.at[j]));
    }
    store(y + i, out);
  });
}

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) backward(SwigluBackward a) {
  const Piece p(a.dim);
  const T *dy = static_cast<const T*>(a.dy) + p.row * a.dy_stride + p.first,
          *gate = static_cast<const T*>(a.gate) + p.row * a.gate_stride + p.first,
          *up = static_cast<const T*>(a.up) + p.row * a.up_stride + p.first;
  T *dgate = static_cast<T*>(a.dgate) + p.row * a.dim + p.first,
    *dup = static_cast<T*>(a.dup) + p.row * a.dim + p.first;
  for_each_group<kVector<T>>(p.count, are_aligned(dy, gate, up, dgate, dup), [&]<int N>(int64_t i) {
    const auto ds = load<T, N>(dy + i), gs = load<T, N>(gate + i), us = load<T, N>(up + i);
    Vector<T, N> out_gate, out_up;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float d = to_float(ds.at[j]), g = to_float(gs.at[j]), s = sigmoid(g);
      const float slope = 1.0f + g * (1.0f - s);
      out_gate.at[j] = from_float<T>(d * to_float(us.at[j]) * s * slope);
      out_up.at[j] = from_float<T>(d * g * s);
    }
    store(dgate + i, out_gate);
    store(dup + i, out_up);
  });
}

dim3 grid_of(int64_t rows, int64_t dim) { return dim3(static_cast<unsigned>(rows * ceil_div(dim, kPiece))); }

}  // namespace

template <>
Status launch_cuda(const Swiglu& a, void* stream) {
  if (!a.rows || !a.dim) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    return launch(forward<decltype(t)>, grid_of(a.rows, a.dim), dim3(BLOCK_SIZE), 0, stream, a);
  });
}

template <>
Status launch_cuda(const SwigluBackward& a, void* stream) {
  if (!a.rows || !a.dim) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    return launch(backward<decltype(t)>, grid_of(a.rows, a.dim), dim3(BLOCK_SIZE), 0, stream, a);
  });
}

}  // namespace finetune
