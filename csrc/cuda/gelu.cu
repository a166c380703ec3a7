// GELU's tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415): y = x · s, s = σ(2u), 2u = x · (a + b x²),
// a = 2 √(2/π), b = 0.044715 a. Backward:   dx = dy · (s + x · s · (1 − s) · (a + 3 b x²)).
//
// Memory: a block takes a piece, 16 bytes a thread and load. Forward reads and writes an element, backward reads two
// and writes one: 8 and 12 bytes an element in fp32, 4 and 6 in 16 bits. About 12 and 21 FLOPs an element (exp counted
// as five), 1.5 to 3.5 FLOPs a byte: the roof is memory bandwidth.
// Faults: gelu.no_tail gelu.no_cube gelu.slope_of_square
#include "finetune/gelu.h"
#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kPiece = 2048;  // elements a block
constexpr float kLinear = 1.5957691216f, kCubic = 0.0713548163f;

// s and s · (1 − s), from exp(−|2u|) so that neither loses its digits. expf, not __expf, whose error grows with the
// argument; an IEEE division would be a call, and spill.
struct Sigmoid {
  float s, slope;

  __device__ __forceinline__ Sigmoid(float x, float square) {
    const float u2 = x * (BUG("gelu.no_cube") ? kLinear : square * kCubic + kLinear);
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
    if (BUG("gelu.no_tail")) count = count / 8 * 8;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) forward(Gelu a) {
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
__global__ void __launch_bounds__(kThreads) backward(GeluBackward a) {
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
      const float inner = square * (kCubic * (BUG("gelu.slope_of_square") ? 2.0f : 3.0f)) + kLinear;
      out.at[j] = from_float<T>(to_float(ds.at[j]) * (sigmoid.s + v * sigmoid.slope * inner));
    }
    store(dx + i, out);
  });
}

template <class Args>
Status launch_pieces(void (*kernel)(Args), void* stream, const Args& a) {
  if (!a.size) return Status::ok;
  return launch(kernel, dim3(static_cast<unsigned>(ceil_div(a.size, kPiece))), dim3(kThreads), 0, stream, a);
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
