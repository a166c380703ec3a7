// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2), all tensors in one parallel loop:
//   m ← β1 m + (1 − β1) g,   v ← β2 v + (1 − β2) g²,
//   p ← (1 − lr λ) p − lr / (1 − β1^t) · m / (sqrt(v) / sqrt(1 − β2^t) + eps).
//
// Memory: reads p, g, m, v and writes p, m, v once: 28 bytes a parameter in fp32 (with an fp32 master and bf16
// parameters and gradients: 28 + 2 − 4 + 2 = 28 as well). About 15 FLOPs a parameter: memory bandwidth is the roof.
#include "finetune/adamw.h"

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

template <class P, class G>
void update(const AdamW& a, const AdamWPiece& piece) {
  P* param = static_cast<P*>(piece.param);
  const G* grad = static_cast<const G*>(piece.grad);
  float *master = piece.master, *m = piece.exp_avg, *v = piece.exp_avg_sq;
  for_each_vector(piece.size, [&](int64_t i, auto get, auto put) {
    const vf g = get(grad + i) * a.grad_scale;
    const vf first = get(m + i) * a.beta1 + g * a.one_minus_beta1;
    const vf second = get(v + i) * a.beta2 + g * g * a.one_minus_beta2;
    const vf p = master ? get(master + i) : get(param + i);
    const vf next = p * a.decay - a.step_size * first / (vsqrt(second) * a.rsqrt_bc2 + a.eps);
    put(m + i, first);
    put(v + i, second);
    if (master) put(master + i, next);
    put(param + i, next);
  });
}

Status adamw(const AdamW& a) {
  parallel_for(a.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const AdamWPiece& piece = a.pieces[at];
      const bool wide_grad = piece.grad_dtype == DType::f32;
      if (piece.param_dtype == DType::f32) {
        wide_grad ? update<float, float>(a, piece) : update<float, bf16>(a, piece);
      } else {
        wide_grad ? update<bf16, float>(a, piece) : update<bf16, bf16>(a, piece);
      }
    }
  });
  return Status::ok;
}

FINETUNE_REGISTER(AdamW, adamw);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
