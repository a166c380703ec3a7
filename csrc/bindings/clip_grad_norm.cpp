#include "finetune/clip_grad_norm.h"

#include <cmath>

#include "common.h"

namespace finetune {
namespace {

#if FINETUNE_DEVICE
Tensor on_one_device(const std::vector<Tensor>& grads, double max_norm) {
  std::vector<ClipGradNorm::Tensor> tensors;
  int64_t pieces = 0;
  for (const Tensor& grad : grads) {
    check(grad.is_contiguous() && grad.get_device_index() == grads[0].get_device_index(), "clip_grad_norm_",
          "grads must be contiguous tensors on one device");
    tensors.push_back({inout(grad), grad.numel(), dtype_of(grad)});
    pieces += (grad.numel() + GradNorm::piece - 1) / GradNorm::piece;
  }
  const Tensor squares = empty_f32(grads[0], {pieces}), norm = empty_f32(grads[0], {}), scale = empty_f32(norm, {});
  run_device("clip_grad_norm_", grads[0],
             ClipGradNorm{tensors.data(), static_cast<int64_t>(tensors.size()), inout<float>(squares), pieces,
                          inout<float>(norm), inout<float>(scale), max_norm});
  return norm;
}
#endif

Tensor clip_grad_norm_(std::vector<Tensor> grads, double max_norm) {
#if FINETUNE_DEVICE
  if (!grads.empty() && on_device(grads[0])) return on_one_device(grads, max_norm);
#endif
  std::vector<GradPiece> pieces;
  for (const Tensor& grad : grads) {
    check(grad.is_cpu() && grad.is_contiguous(), "clip_grad_norm_", "grads must be contiguous CPU tensors");
    const DType dtype = dtype_of(grad);
    char* data = static_cast<char*>(grad.mutable_data_ptr());
    for (int64_t at = 0; at < grad.numel(); at += GradNorm::piece) {
      pieces.push_back({data + at * bytes_of(dtype), std::min(GradNorm::piece, grad.numel() - at), dtype});
    }
  }
  const auto count = static_cast<int64_t>(pieces.size());
  std::vector<double> squares(pieces.size());
  run("clip_grad_norm_", GradNorm{pieces.data(), squares.data(), count});
  double total = 0;
  for (const double square : squares) total += square;
  const double norm = std::sqrt(total), scale = max_norm / (norm + 1e-6);
  if (!(scale >= 1)) {  // not `scale < 1`: a NaN norm makes every gradient NaN, as in torch
    run("clip_grad_norm_", GradScale{pieces.data(), count, static_cast<float>(scale)});
  }
  const Tensor out = torch::stable::empty({}, ScalarType::Float);
  *out.mutable_data_ptr<float>() = static_cast<float>(norm);
  return out;
}

}  // namespace

FINETUNE_SCHEMAS(m) { m.def("clip_grad_norm_(Tensor(a!)[] grads, float max_norm) -> Tensor norm"); }
FINETUNE_KERNELS(m) { m.impl("clip_grad_norm_", TORCH_BOX(&clip_grad_norm_)); }

}  // namespace finetune
