// Clipping by the global norm (Pascanu et al. 2013, arXiv:1211.5063): two sweeps over all tensors in one parallel
// loop each, Σ g² and then g ← g · scale. The sum is in double precision (a square of a float never overflows there).
//
// Memory: the norm reads every gradient once; the scaling, which only happens when the norm is too large, reads and
// writes it once: 4 and 8 bytes an element in fp32. Memory bandwidth is the roof.
#include "finetune/clip_grad_norm.h"

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

typedef double vd __attribute__((vector_size(8 * kLanes)));

template <class T>
double squares(const GradPiece& piece) {
  const T* grad = static_cast<const T*>(piece.data);
  vd total{};
  for_each_vector(piece.size, [&](int64_t i, auto get, auto) {
    const vd g = __builtin_convertvector(get(grad + i), vd);
    total += g * g;
  });
  double out = 0;
  for (int lane = 0; lane < kLanes; ++lane) out += total[lane];
  return out;
}

template <class T>
void scale(const GradPiece& piece, float by) {
  T* grad = static_cast<T*>(piece.data);
  for_each_vector(piece.size, [&](int64_t i, auto get, auto put) { put(grad + i, get(grad + i) * by); });
}

Status grad_norm(const GradNorm& a) {
  parallel_for(a.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      a.squares[at] = a.pieces[at].dtype == DType::f32 ? squares<float>(a.pieces[at]) : squares<bf16>(a.pieces[at]);
    }
  });
  return Status::ok;
}

Status grad_scale(const GradScale& a) {
  parallel_for(a.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      a.pieces[at].dtype == DType::f32 ? scale<float>(a.pieces[at], a.scale) : scale<bf16>(a.pieces[at], a.scale);
    }
  });
  return Status::ok;
}

FINETUNE_REGISTER(GradNorm, grad_norm);
FINETUNE_REGISTER(GradScale, grad_scale);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
