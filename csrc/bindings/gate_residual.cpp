#include "finetune/gate_residual.h"

#include "common.h"

namespace finetune {
namespace {

int64_t rows_of(const Tensor& x, const Tensor& gate, const char* op) {
  check(x.dim() >= 2 && gate.dim() == 2 && gate.size(0) == x.size(0) && gate.size(1) == x.size(-1), op,
        "the gate must be (items, dim) of x (items, …, dim)");
  check(gate.scalar_type() == x.scalar_type(), op, "x, gate and branch must have one dtype");
  int64_t rows = 1;
  for (int64_t i = 1; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

Tensor gate_residual(const Tensor& x_, const Tensor& gate_, const Tensor& branch_) {
  const int64_t rows = rows_of(x_, gate_, "gate_residual");
  check(branch_.sizes().equals(x_.sizes()) && branch_.scalar_type() == x_.scalar_type(), "gate_residual",
        "x and branch must have one shape and dtype");
  const Tensor x = torch::stable::contiguous(x_), branch = torch::stable::contiguous(branch_);
  const Rows gate(gate_);
  Tensor y = torch::stable::new_empty(x_, x_.sizes());
  run("gate_residual", x,
      GateResidual{dtype_of(x), in(x), in(gate.tensor), in(branch), out(y), x.size(0), rows, x.size(-1), gate.stride});
  return y;
}

std::tuple<Tensor, Tensor> gate_residual_backward(const Tensor& dy_, const Tensor& gate_, const Tensor& branch_) {
  const int64_t rows = rows_of(branch_, gate_, "gate_residual_backward");
  check_gradient(dy_, branch_, "gate_residual_backward");
  const Tensor dy = torch::stable::contiguous(dy_), branch = torch::stable::contiguous(branch_);
  const Rows gate(gate_);
  const int64_t items = branch.size(0), dim = branch.size(-1);
  Tensor dgate = torch::stable::new_empty(gate_, {items, dim});
  Tensor dbranch = torch::stable::new_empty(branch_, branch_.sizes());
  Tensor partial = empty_f32(branch, {item_scratch(on_device(branch), items, rows, dim, 1)});
  run("gate_residual_backward", branch,
      GateResidualBackward{dtype_of(branch), in(dy), in(gate.tensor), in(branch), out(dgate), out(dbranch),
                           out<float>(partial), items, rows, dim, gate.stride});
  return {dgate, dbranch};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def("gate_residual(Tensor x, Tensor gate, Tensor branch) -> Tensor");
  m.def("gate_residual_backward(Tensor dy, Tensor gate, Tensor branch) -> (Tensor dgate, Tensor dbranch)");
}
FINETUNE_KERNELS(m) {
  FINETUNE_KERNEL(m, "gate_residual", gate_residual);
  FINETUNE_KERNEL(m, "gate_residual_backward", gate_residual_backward);
}

}  // namespace finetune
