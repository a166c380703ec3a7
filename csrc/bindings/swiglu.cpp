#include "finetune/swiglu.h"

#include "common.h"

namespace finetune {
namespace {

Tensor swiglu(const Tensor& gate_, const Tensor& up_) {
  check(gate_.sizes().equals(up_.sizes()), "swiglu", "gate and up must have one shape");
  check(gate_.scalar_type() == up_.scalar_type(), "swiglu", "gate and up must have one dtype");
  const Rows gate(gate_), up(up_);
  Tensor y = torch::stable::new_empty(gate_, gate_.sizes());
  run("swiglu", gate_,
      Swiglu{dtype_of(gate_), in(gate.tensor), in(up.tensor), out(y), gate.rows, gate.dim, gate.stride, up.stride});
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy_, const Tensor& gate_, const Tensor& up_) {
  check_gradient(dy_, gate_, "swiglu_backward");
  check_gradient(dy_, up_, "swiglu_backward");
  const Rows dy(dy_), gate(gate_), up(up_);
  Tensor dgate = torch::stable::new_empty(gate_, gate_.sizes()), dup = torch::stable::new_empty(up_, up_.sizes());
  run("swiglu_backward", gate_,
      SwigluBackward{dtype_of(gate_), in(dy.tensor), in(gate.tensor), in(up.tensor), out(dgate), out(dup), gate.rows,
                     gate.dim, dy.stride, gate.stride, up.stride});
  return {dgate, dup};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)");
}
FINETUNE_KERNELS(m) {
  FINETUNE_KERNEL(m, "swiglu", swiglu);
  FINETUNE_KERNEL(m, "swiglu_backward", swiglu_backward);
}

}  // namespace finetune
