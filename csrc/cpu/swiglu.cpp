// SwiGLU (Shazeer 2020, arXiv:2002.05202): y = silu(g) · u, silu(g) = g · s, s = 1 / (1 + exp(−g)).
// Backward:   dg = dy · u · s · (1 + g · (1 − s)),   du = dy · g · s;   s is computed anew, nothing is kept.
//
// Memory: forward reads two elements and writes one, backward reads three and writes two; about 25 and 32 FLOPs an
// element (exp is 18 of them), so bandwidth is the roof from L3 outwards. All arithmetic is fp32.
#include "finetune/swiglu.h"

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

// body(row, first, count) over pieces of rows, so that one long row is shared by the threads too.
template <class Body>
void for_each_piece(int64_t rows, int64_t dim, Body&& body) {
  constexpr int64_t kPiece = 2048;
  const int64_t pieces = (dim + kPiece - 1) / kPiece;
  parallel_for(rows * pieces, 1 + 8 * kPiece / (dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % pieces * kPiece;
      body(task / pieces, first, dim - first < kPiece ? dim - first : kPiece);
    }
  });
}

FINETUNE_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

template <class T>
void forward(const Swiglu& a) {
  for_each_piece(a.rows, a.dim, [&](int64_t row, int64_t first, int64_t count) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride + first;
    T* y = static_cast<T*>(a.y) + row * a.dim + first;
    for_each_vector(count, [&](int64_t i, auto get, auto put) {
      const vf g = get(gate + i);
      put(y + i, g * sigmoid(g) * get(up + i));
    });
  });
}

template <class T>
void backward(const SwigluBackward& a) {
  for_each_piece(a.rows, a.dim, [&](int64_t row, int64_t first, int64_t count) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride + first;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride + first;
    T* dgate = static_cast<T*>(a.dgate) + row * a.dim + first;
    T* dup = static_cast<T*>(a.dup) + row * a.dim + first;
    for_each_vector(count, [&](int64_t i, auto get, auto put) {
      const vf g = get(gate + i), d = get(dy + i), s = sigmoid(g);
      put(dgate + i, d * get(up + i) * s * (1.0f + g * (1.0f - s)));
      put(dup + i, d * g * s);
    });
  });
}

Status swiglu(const Swiglu& a) {
  a.dtype == DType::f32 ? forward<float>(a) : forward<bf16>(a);
  return Status::ok;
}

Status swiglu_backward(const SwigluBackward& a) {
  a.dtype == DType::f32 ? backward<float>(a) : backward<bf16>(a);
  return Status::ok;
}

FINETUNE_REGISTER(Swiglu, swiglu);
FINETUNE_REGISTER(SwigluBackward, swiglu_backward);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
