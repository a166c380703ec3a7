#include "finetune/group_norm_silu.h"

#include "common.h"

namespace finetune {
namespace {

struct Shape {
  int64_t images, channels, positions = 1;

  Shape(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, const char* op) {
    check(x.dim() >= 2 && weight.dim() == 1 && weight.size(0) == x.size(1) && bias.sizes().equals(weight.sizes()), op,
          "weight and bias must be (channels,) of x (images, channels, …)");
    check(x.scalar_type() == weight.scalar_type() && x.scalar_type() == bias.scalar_type(), op,
          "x, weight and bias must have one dtype");
    images = x.size(0), channels = x.size(1);
    check(groups >= 1 && channels % groups == 0, op, "the channels do not divide into the groups");
    for (int64_t i = 2; i < x.dim(); ++i) positions *= x.size(i);
  }
};

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x_, const Tensor& weight_, const Tensor& bias_,
                                                   int64_t groups, double eps) {
  const Shape s(x_, weight_, bias_, groups, "group_norm_silu");
  const Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_),
               bias = torch::stable::contiguous(bias_);
  Tensor y = torch::stable::new_empty(x_, x_.sizes());
  Tensor mean = empty_f32(x, {s.images * groups}), rstd = empty_f32(x, {s.images * groups});
  run("group_norm_silu", x,
      GroupNormSilu{dtype_of(x), in(x), in(weight), in(bias), out(y), out<float>(mean), out<float>(rstd), s.images,
                    s.channels, s.positions, groups, static_cast<float>(eps)});
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(const Tensor& dy_, const Tensor& x_, const Tensor& weight_,
                                                            const Tensor& bias_, const Tensor& mean, const Tensor& rstd,
                                                            int64_t groups) {
  const Shape s(x_, weight_, bias_, groups, "group_norm_silu_backward");
  check_gradient(dy_, x_, "group_norm_silu_backward");
  check(mean.numel() == s.images * groups && rstd.numel() == s.images * groups, "group_norm_silu_backward",
        "mean and rstd must be those of x");
  const Tensor dy = torch::stable::contiguous(dy_), x = torch::stable::contiguous(x_),
               weight = torch::stable::contiguous(weight_), bias = torch::stable::contiguous(bias_);
  Tensor dx = torch::stable::new_empty(x_, x_.sizes());
  Tensor dweight = torch::stable::new_empty(weight, {s.channels}), dbias = torch::stable::new_empty(bias, {s.channels});
  Tensor partial = empty_f32(x, {2 * s.images * s.channels});
  run("group_norm_silu_backward", x,
      GroupNormSiluBackward{dtype_of(x), in(dy), in(x), in(weight), in(bias), in<float>(mean), in<float>(rstd), out(dx),
                            out(dweight), out(dbias), out<float>(partial), s.images, s.channels, s.positions, groups});
  return {dx, dweight, dbias};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor y, Tensor mean, Tensor "
      "rstd)");
  m.def(
      "group_norm_silu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");
}
FINETUNE_KERNELS(m) {
  FINETUNE_KERNEL(m, "group_norm_silu", group_norm_silu);
  FINETUNE_KERNEL(m, "group_norm_silu_backward", group_norm_silu_backward);
}

}  // namespace finetune
