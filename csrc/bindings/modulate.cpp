#include "finetune/modulate.h"

#include "common.h"

namespace finetune {
namespace {

void check_item_rows(const Tensor& x, const Tensor& t, const char* op) {
  check(x.dim() >= 2 && t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == x.size(-1), op,
        "shift and scale must be (items, dim) of x (items, …, dim)");
  check(t.scalar_type() == x.scalar_type(), op, "x, shift and scale must have one dtype");
}

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 1; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> modulate(const Tensor& x_, const Tensor& shift_, const Tensor& scale_, double eps) {
  check_item_rows(x_, shift_, "modulate");
  check_item_rows(x_, scale_, "modulate");
  const Tensor x = torch::stable::contiguous(x_);
  const Rows shift(shift_), scale(scale_);
  const int64_t items = x.size(0), dim = x.size(-1), rows = rows_of(x), all = dim ? items * rows : 0;
  Tensor y = torch::stable::new_empty(x_, x_.sizes()), mean = empty_f32(x, {all}), rstd = empty_f32(x, {all});
  run("modulate", x,
      Modulate{dtype_of(x), in(x), in(shift.tensor), in(scale.tensor), out(y), out<float>(mean), out<float>(rstd),
               items, rows, dim, shift.stride, scale.stride, static_cast<float>(eps)});
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> modulate_backward(const Tensor& dy_, const Tensor& x_, const Tensor& scale_,
                                                     const Tensor& mean, const Tensor& rstd) {
  check_gradient(dy_, x_, "modulate_backward");
  check_item_rows(x_, scale_, "modulate_backward");
  const Tensor dy = torch::stable::contiguous(dy_), x = torch::stable::contiguous(x_);
  const Rows scale(scale_);
  const int64_t items = x.size(0), dim = x.size(-1), rows = rows_of(x);
  check(mean.numel() * dim == x.numel() && rstd.numel() == mean.numel(), "modulate_backward",
        "mean and rstd must be those of x");
  Tensor dx = torch::stable::new_empty(x_, x_.sizes());
  Tensor dshift = torch::stable::new_empty(scale_, {items, dim}),
         dscale = torch::stable::new_empty(scale_, {items, dim});
  Tensor partial = empty_f32(x, {ModulateBackward::scratch(on_device(x), items, rows, dim)});
  run("modulate_backward", x,
      ModulateBackward{dtype_of(x), in(dy), in(x), in(scale.tensor), in<float>(mean), in<float>(rstd), out(dx),
                       out(dshift), out(dscale), out<float>(partial), items, rows, dim, scale.stride});
  return {dx, dshift, dscale};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def("modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "modulate_backward(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> (Tensor dx, Tensor dshift, "
      "Tensor dscale)");
}
FINETUNE_KERNELS(m) {
  FINETUNE_KERNEL(m, "modulate", modulate);
  FINETUNE_KERNEL(m, "modulate_backward", modulate_backward);
}

}  // namespace finetune
