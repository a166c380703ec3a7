#include "finetune/layer_norm.h"

#include "common.h"

namespace finetune {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x_, const Tensor& weight_,
                                              const std::optional<Tensor>& bias_, double eps) {
  const Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  check(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1), "layer_norm",
        "weight must be (dim,) of x (..., dim)");
  check(x.scalar_type() == weight.scalar_type(), "layer_norm", "x and weight must have one dtype");
  std::optional<Tensor> bias;
  if (bias_) {
    bias = torch::stable::contiguous(*bias_);
    check(bias->sizes().equals(weight.sizes()), "layer_norm", "bias must be (dim,) of x (..., dim)");
    check(bias->scalar_type() == x.scalar_type(), "layer_norm", "x and bias must have one dtype");
  }
  const int64_t dim = x.size(-1), rows = dim ? x.numel() / dim : 0;
  Tensor y = torch::stable::empty_like(x), mean = empty_f32(x, {rows}), rstd = empty_f32(x, {rows});
  run("layer_norm", x,
      LayerNorm{dtype_of(x), in(x), in(weight), bias ? in(*bias) : nullptr, out(y), out<float>(mean), out<float>(rstd),
                rows, dim, static_cast<float>(eps)});
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy_, const Tensor& x_, const Tensor& weight_,
                                                       const Tensor& mean, const Tensor& rstd, bool weight_grad,
                                                       bool bias_grad) {
  const Tensor dy = torch::stable::contiguous(dy_), x = torch::stable::contiguous(x_),
               weight = torch::stable::contiguous(weight_);
  const int64_t dim = x.size(-1), rows = rstd.numel();
  check_gradient(dy, x, "layer_norm_backward");
  check(weight.numel() == dim && rows * dim == x.numel() && mean.numel() == rows &&
            weight.scalar_type() == x.scalar_type(),
        "layer_norm_backward", "weight, mean and rstd must be those of x");
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::new_empty(weight, {weight_grad ? dim : 0});
  Tensor dbias = torch::stable::new_empty(weight, {bias_grad ? dim : 0});
  Tensor partial = empty_f32(x, {LayerNormBackward::scratch(on_device(x), rows, dim, weight_grad, bias_grad)});
  run("layer_norm_backward", x,
      LayerNormBackward{dtype_of(x), in(dy), in(x), in(weight), in<float>(mean), in<float>(rstd), out(dx),
                        weight_grad ? out(dweight) : nullptr, bias_grad ? out(dbias) : nullptr, out<float>(partial),
                        rows, dim});
  return {dx, dweight, dbias};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool weight_grad, bool "
      "bias_grad) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}
FINETUNE_KERNELS(m) {
  FINETUNE_KERNEL(m, "layer_norm", layer_norm);
  FINETUNE_KERNEL(m, "layer_norm_backward", layer_norm_backward);
}

}  // namespace finetune
