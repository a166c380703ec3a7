// GELU, tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415).
//
//   forward    y = x · s,   s = σ(2u),   2u = x · (a + b x²),   a = 2 √(2/π),   b = 0.044715 a
//   backward   dx = dy · (s + x · s · (1 − s) · (a + 3 b x²))
//
// A block takes a piece of the elements, a thread 16 bytes at a time.
//
//               bytes an element, fp32 (16 bits)               FLOPs an element (exp counted as five)
//   forward     8 (4): reads x, writes y                       12
//   backward    12 (6): reads x and dy, writes dx              21
//
// 1.5 to 3.5 FLOPs a byte: the roof is memory bandwidth.
#include "finetune/gelu.h"

#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 128;
constexpr int64_t kPiece = 2048;  // elements a block
constexpr float kLinear = 1.5957691216f, kCubic = 0.0713548163f;

// s and s · (1 − s), from exp(−|2u|) so that neither loses its digits. expf, not __expf, whose error grows with the
// argument; an IEEE division would be a call, and spill.
struct Sigmoid {
  float s, slope;

  __device__ __forceinline__ Sigmoid(float x, float square) {
    const float u2 = x * (square * kCubic + kLinear);
    const float e = expf(-fabsf(u2)), r = __fdividef(1.0f, 1.0f + e);
    s = u2 < 0 ? e * r : r;
    slope = e * r * r;
  }
};

// This block's piece of `size` elements.
struct Piece {
  int64_t first, count;

  __device__ explicit Piece(int64_t size) : first(blockIdx.x * kPiece) {
    count = size - first < kPiece ? size - first : kPiece;
  }
};

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) forward(Gelu a) {
  const Piece p(a.size);
  const T* x = static_cast<const T*>(a.x) + p.first;
  T* y = static_cast<T*>(a.y) + p.first;
  for_each_group<kVector<T>>(p.count, are_aligned(x, y), [&]<int N>(int64_t i) {
    const auto xs = load<T, N>(x + i);
    Vector<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float v = to_float(xs.at[j]);
      out.at[j] = from_float<T>(v * Sigmoid(v, v * v).s);
    }
    store(y + i, out);
  });
}

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) backward(GeluBackward a) {
  const Piece p(a.size);
  const T *dy = static_cast<const T*>(a.dy) + p.first, *x = static_cast<const T*>(a.x) + p.first;
  T* dx = static_cast<T*>(a.dx) + p.first;
  for_each_group<kVector<T>>(p.count, are_aligned(dy, x, dx), [&]<int N>(int64_t i) {
    const auto ds = load<T, N>(dy + i), xs = load<T, N>(x + i);
    Vector<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float v = to_float(xs.at[j]), square = v * v;
      const Sigmoid sigmoid(v, square);
      const float inner = square * (kCubic * 3.0f) + kLinear;
      out.at[j] = from_float<T>(to_float(ds.at[j]) * (sigmoid.s + v * sigmoid.slope * inner));
    }
    store(dx + i, out);
  });
}

template <class Args>
Status launch_pieces(void (*kernel)(Args), void* stream, const Args& a) {
  if (!a.size) return Status::ok;
  return launch(kernel, dim3(static_cast<unsigned>(ceil_div(a.size, kPiece))), dim3(BLOCK_SIZE), 0, stream, a);
}

}  // namespace

template <>
Status launch_cuda(const Gelu& a, void* stream) {
  return for_dtype(a.dtype, [&](auto t) { return launch_pieces(forward<decltype(t)>, stream, a); });
}

template <>
Status launch_cuda(const GeluBackward& a, void* stream) {
  return for_dtype(a.dtype, [&](auto t) { return launch_pieces(backward<decltype(t)>, stream, a); });
}

}  // namespace finetune
