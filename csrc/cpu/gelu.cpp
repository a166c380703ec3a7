// GELU's tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415): y = x · s, s = σ(2u), 2u = x · (a + b x²),
// a = 2 √(2/π), b = 0.044715 a. Backward:   dx = dy · (s + x · s · (1 − s) · (a + 3 b x²)).
//
// Memory: forward reads and writes an element, backward reads two and writes one; about 27 and 38 FLOPs an element (exp
// is 18 of them), so bandwidth is the roof from L3 outwards. All arithmetic is fp32.
#include "finetune/gelu.h"

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int64_t kPiece = 8192;
constexpr float kLinear = 1.5957691216f, kCubic = 0.0713548163f;

template <class Body>
void for_each_piece(int64_t size, Body&& body) {
  parallel_for((size + kPiece - 1) / kPiece, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece, last = end * kPiece < size ? end * kPiece : size;
    body(first, last - first);
  });
}

// σ(2u): exp gives infinity where it overflows, and the quotient is 0 then. A NaN stays one.
FINETUNE_INLINE vf share(vf x, vf square) { return 1.0f / (1.0f + vexp(x * (square * -kCubic - kLinear))); }

template <class T>
void forward(const Gelu& a) {
  for_each_piece(a.size, [&](int64_t first, int64_t count) {
    const T* x = static_cast<const T*>(a.x) + first;
    T* y = static_cast<T*>(a.y) + first;
    for_each_vector(count, [&](int64_t i, auto get, auto put) {
      const vf v = get(x + i);
      put(y + i, v * share(v, v * v));
    });
  });
}

template <class T>
void backward(const GeluBackward& a) {
  for_each_piece(a.size, [&](int64_t first, int64_t count) {
    const T* dy = static_cast<const T*>(a.dy) + first;
    const T* x = static_cast<const T*>(a.x) + first;
    T* dx = static_cast<T*>(a.dx) + first;
    for_each_vector(count, [&](int64_t i, auto get, auto put) {
      const vf v = get(x + i), square = v * v, u2 = v * (square * kCubic + kLinear);
      const vi negative = u2 < 0.0f;
      const vf e = vexp(select(negative, u2, -u2)),
               r = 1.0f / (1.0f + e);  // of −|2u|: s (1 − s) = e r² has every digit
      const vf s = select(negative, e * r, r);
      put(dx + i, get(dy + i) * (s + v * (e * r * r) * (square * (3.0f * kCubic) + kLinear)));
    });
  });
}

Status gelu(const Gelu& a) {
  a.dtype == DType::f32 ? forward<float>(a) : forward<bf16>(a);
  return Status::ok;
}

Status gelu_backward(const GeluBackward& a) {
  a.dtype == DType::f32 ? backward<float>(a) : backward<bf16>(a);
  return Status::ok;
}

FINETUNE_REGISTER(Gelu, gelu);
FINETUNE_REGISTER(GeluBackward, gelu_backward);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
