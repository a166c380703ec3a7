#include "finetune/rope.h"

#include "common.h"

namespace finetune {
namespace {

Tensor rope(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, const Tensor& positions_, bool inverse) {
  check(x_.dim() == 4, "rope", "x must be (B, T, H, D)");
  const int64_t batch = x_.size(0), length = x_.size(1), heads = x_.size(2), dim = x_.size(3);
  check(dim % 2 == 0, "rope", "the head dimension D must be even");
  check(cos_.dim() == 2 && cos_.size(1) == dim / 2 && cos_.sizes().equals(sin_.sizes()), "rope",
        "cos and sin must be (max_T, D/2) for x (B, T, H, D)");
  check(cos_.scalar_type() == ScalarType::Float && sin_.scalar_type() == ScalarType::Float, "rope",
        "cos and sin must be float32");
  check(positions_.dim() == 2 && positions_.size(0) == batch && positions_.size(1) == length, "rope",
        "positions must be (B, T) for x (B, T, H, D)");
  check(positions_.scalar_type() == ScalarType::Long, "rope", "positions must be int64");

  const Tensor x = dim <= 1 || x_.stride(3) == 1 ? x_ : torch::stable::contiguous(x_);
  const Tensor cos = torch::stable::contiguous(cos_), sin = torch::stable::contiguous(sin_),
               positions = torch::stable::contiguous(positions_);
  const int64_t limit = cos.size(0);
  if (!on_device(x)) {  // a device would have to be waited for: its kernel marks such tokens with NaN
    const int64_t* at = positions.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < batch * length; ++i) {
      STD_TORCH_CHECK(at[i] >= 0 && at[i] < limit, "finetune::rope: position ", at[i], " (row ", i / length, ", token ",
                      i % length, ") is outside the tables of ", limit, " positions");
    }
  }
  Tensor y = torch::stable::new_empty(x, x.sizes());
  run("rope", x,
      Rope{dtype_of(x), in(x), in<float>(cos), in<float>(sin), in<int64_t>(positions), out(y), batch, length, heads,
           dim, limit, x.stride(0), x.stride(1), x.stride(2), inverse});
  return y;
}

}  // namespace

FINETUNE_SCHEMAS(m) { m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool inverse=False) -> Tensor"); }
FINETUNE_KERNELS(m) { FINETUNE_KERNEL(m, "rope", rope); }

}  // namespace finetune
