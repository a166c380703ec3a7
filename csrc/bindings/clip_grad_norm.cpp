#include "finetune/clip_grad_norm.h"

#include <cmath>

#include "finetune/global_norm.h"
#include "pieces.h"

namespace finetune {
namespace {

Tensor clip_grad_norm_(std::vector<Tensor> grads, double max_norm) {
  const char* op = "clip_grad_norm_";
  check(!grads.empty(), op, "expected a gradient");
  const Pieces pieces = cut(grads, op, true);
  const Tensor norm = empty_f32(grads[0], {});
#if FINETUNE_DEVICE
  if (on_device(grads[0])) {
    const Tensor squares = empty_f32(norm, {pieces.blocks}), scale = empty_f32(norm, {});
    run_device(op, norm,
               ClipGradNormCuda{pieces.data(), pieces.count(), out<float>(squares), pieces.blocks, out<float>(norm),
                                out<float>(scale), max_norm});
    return norm;
  }
#endif
  std::vector<double> squares(pieces.count());
  run(op, GlobalNorm{pieces.data(), pieces.count(), squares.data()});
  const double root = std::sqrt(sum(squares)), scale = max_norm / (root + 1e-6);
  if (!(scale >= 1)) {  // not `scale < 1`: a NaN norm makes every gradient NaN, as in torch
    run(op, GradScale{pieces.data(), pieces.count(), static_cast<float>(scale)});
  }
  *norm.mutable_data_ptr<float>() = static_cast<float>(root);
  return norm;
}

}  // namespace

FINETUNE_SCHEMAS(m) { m.def("clip_grad_norm_(Tensor(a!)[] grads, float max_norm) -> Tensor norm"); }
FINETUNE_KERNELS(m) { FINETUNE_KERNEL(m, "clip_grad_norm_", clip_grad_norm_); }

}  // namespace finetune
