#include "finetune/gelu.h"

#include "common.h"

namespace finetune {
namespace {

Tensor gelu(const Tensor& x_) {
  const Tensor x = torch::stable::contiguous(x_);
  Tensor y = torch::stable::empty_like(x);
  run("gelu", x, Gelu{dtype_of(x), in(x), out(y), x.numel()});
  return y;
}

Tensor gelu_backward(const Tensor& dy_, const Tensor& x_) {
  const Tensor dy = torch::stable::contiguous(dy_), x = torch::stable::contiguous(x_);
  check_gradient(dy, x, "gelu_backward");
  Tensor dx = torch::stable::empty_like(x);
  run("gelu_backward", x, GeluBackward{dtype_of(x), in(dy), in(x), out(dx), x.numel()});
  return dx;
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def("gelu(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor dy, Tensor x) -> Tensor");
}
FINETUNE_KERNELS(m) {
  FINETUNE_KERNEL(m, "gelu", gelu);
  FINETUNE_KERNEL(m, "gelu_backward", gelu_backward);
}

}  // namespace finetune
