#include "finetune/rms_norm.h"

#include "common.h"

namespace finetune {
namespace {

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_, const Tensor& weight_, double eps) {
  const Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  check(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1), "rms_norm",
        "weight must be (dim,) of x (..., dim)");
  check(x.scalar_type() == weight.scalar_type(), "rms_norm", "x and weight must have one dtype");
  const int64_t dim = x.size(-1), rows = dim ? x.numel() / dim : 0;
  Tensor y = torch::stable::empty_like(x), rstd = empty_f32(x, {rows});
  run("rms_norm", RmsNorm{dtype_of(x), x.const_data_ptr(), weight.const_data_ptr(), y.mutable_data_ptr(),
                          rstd.mutable_data_ptr<float>(), rows, dim, static_cast<float>(eps)});
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_, const Tensor& x_, const Tensor& weight_,
                                             const Tensor& rstd, bool weight_grad) {
  const Tensor dy = torch::stable::contiguous(dy_), x = torch::stable::contiguous(x_),
               weight = torch::stable::contiguous(weight_);
  const int64_t dim = x.size(-1), rows = rstd.numel();
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::new_empty(weight, {weight_grad ? dim : 0});
  Tensor partial = empty_f32(x, {weight_grad ? RmsNormBackward::blocks * dim : 0});
  run("rms_norm_backward", RmsNormBackward{dtype_of(x), dy.const_data_ptr(), x.const_data_ptr(),
                                           weight.const_data_ptr(), rstd.const_data_ptr<float>(), dx.mutable_data_ptr(),
                                           weight_grad ? dweight.mutable_data_ptr() : nullptr,
                                           weight_grad ? partial.mutable_data_ptr<float>() : nullptr, rows, dim});
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(finetune, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool weight_grad) -> (Tensor dx, Tensor "
      "dweight)");
}
STABLE_TORCH_LIBRARY_IMPL(finetune, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace finetune
