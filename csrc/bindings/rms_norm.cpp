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
  run("rms_norm", x,
      RmsNorm{dtype_of(x), in(x), in(weight), out(y), out<float>(rstd), rows, dim, static_cast<float>(eps)});
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_, const Tensor& x_, const Tensor& weight_,
                                             const Tensor& rstd, bool weight_grad) {
  const Tensor dy = torch::stable::contiguous(dy_), x = torch::stable::contiguous(x_),
               weight = torch::stable::contiguous(weight_);
  const int64_t dim = x.size(-1), rows = rstd.numel();
  check_gradient(dy, x, "rms_norm_backward");
  check(weight.numel() == dim && rows * dim == x.numel() && weight.scalar_type() == x.scalar_type(),
        "rms_norm_backward", "weight and rstd must be those of x");
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::new_empty(weight, {weight_grad ? dim : 0});
  Tensor partial = empty_f32(x, {RmsNormBackward::scratch(on_device(x), rows, dim, weight_grad)});
  run("rms_norm_backward", x,
      RmsNormBackward{dtype_of(x), in(dy), in(x), in(weight), in<float>(rstd), out(dx),
                      weight_grad ? out(dweight) : nullptr, out<float>(partial), rows, dim});
  return {dx, dweight};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool weight_grad) -> (Tensor dx, Tensor "
      "dweight)");
}
FINETUNE_KERNELS(m) {
  FINETUNE_KERNEL(m, "rms_norm", rms_norm);
  FINETUNE_KERNEL(m, "rms_norm_backward", rms_norm_backward);
}

}  // namespace finetune
