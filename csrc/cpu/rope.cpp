// Rotary position embedding (Su et al. 2021, arXiv:2104.09864), rotate-half convention: with x1, x2 the halves of a
// head,   y1 = x1 · cos θ − x2 · sin θ,   y2 = x2 · cos θ + x1 · sin θ,   θ = position · frequency from the tables.
// The rotation is orthogonal, so its backward pass is the rotation by −θ.
//
// Memory: x read and y written once; a position's row of the tables is shared by all heads and stays in L1. Three
// FLOPs an element: the roof is memory bandwidth. All arithmetic is fp32.
#include "finetune/rope.h"

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

template <class T>
void rotate(const Rope& a) {
  const int64_t half = a.dim / 2;
  const float sign = a.inverse ? -1.0f : 1.0f;
  parallel_for(a.batch * a.length, 1 + 16384 / (a.heads * a.dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / a.length, t = token % a.length;
      const float* cos = a.cos + a.positions[token] * half;
      const float* sin = a.sin + a.positions[token] * half;
      for (int64_t head = 0; head < a.heads; ++head) {
        const T* x = static_cast<const T*>(a.x) + b * a.stride_batch + t * a.stride_length + head * a.stride_head;
        T* y = static_cast<T*>(a.y) + (token * a.heads + head) * a.dim;
        for_each_vector(half, [&](int64_t i, auto get, auto put) {
          const vf x1 = get(x + i), x2 = get(x + half + i), c = get(cos + i), s = get(sin + i) * sign;
          put(y + i, x1 * c - x2 * s);
          put(y + half + i, x2 * c + x1 * s);
        });
      }
    }
  });
}

Status rope(const Rope& a) {
  a.dtype == DType::f32 ? rotate<float>(a) : rotate<bf16>(a);
  return Status::ok;
}

FINETUNE_REGISTER(Rope, rope);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
