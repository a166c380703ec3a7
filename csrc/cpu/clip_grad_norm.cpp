// Clipping by the global norm (Pascanu et al. 2013, arXiv:1211.5063): two sweeps over all tensors in one parallel
// loop each, Σ g² and then g ← g · scale. The sum is in double precision (a square of a float never overflows there).
//
// Memory: the norm reads every gradient once; the scaling, which only happens when the norm is too large, reads and
// writes it once: 4 and 8 bytes an element in fp32. Memory bandwidth is the roof.
#include "finetune/clip_grad_norm.h"

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

// Half a vector of floats and the doubles it becomes: a whole one would make gcc convert element by element.
typedef float half_f __attribute__((vector_size(2 * kLanes)));
typedef double half_d __attribute__((vector_size(4 * kLanes)));

FINETUNE_INLINE void add_squares(vf g, half_d* totals) {
  half_f halves[2];
  std::memcpy(halves, &g, sizeof g);
  for (int i = 0; i < 2; ++i) {
    const half_d wide = __builtin_convertvector(halves[i], half_d);
    totals[i] += wide * wide;
  }
}

template <class T>
double squares(const GradPiece& piece) {
  const T* grad = static_cast<const T*>(piece.data);
  half_d totals[4] = {};  // two vectors in flight, so that the additions need not wait for each other
  int64_t i = 0;
  for (; i + 2 * kLanes <= piece.size; i += 2 * kLanes) {
    add_squares(load(grad + i), totals);
    add_squares(load(grad + i + kLanes), totals + 2);
  }
  for_each_vector(piece.size - i, [&](int64_t j, auto get, auto) { add_squares(get(grad + i + j), totals); });
  const half_d total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
  double out = 0;
  for (int lane = 0; lane < kLanes / 2; ++lane) out += total[lane];
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
