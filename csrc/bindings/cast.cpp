#include "finetune/cast.h"

#include "common.h"

namespace finetune {
namespace {

// 8-bit floats come and go as uint8: few of torch's operations know them.
ScalarType type_of(Format format) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Byte,
                                  ScalarType::Byte};
  return types[static_cast<int>(format)];
}

Format format_of(int64_t number) {
  check(number >= 0 && number <= 4, "cast", "formats are 0 … 4");
  return static_cast<Format>(number);
}

Tensor cast(const Tensor& x_, int64_t from_, int64_t to_, double scale, std::optional<Tensor> scale_tensor,
            bool stochastic, int64_t seed, bool saturate) {
  const Format from = format_of(from_), to = format_of(to_);
  check(x_.scalar_type() == type_of(from), "cast", "x is not of the format given");
  const Tensor x = torch::stable::contiguous(x_);
  Tensor y = torch::stable::new_empty(x, x.sizes(), type_of(to));
  const bool device = on_device(x);
  const float* number = scale_tensor ? one_float(*scale_tensor, "cast", "scale") : nullptr;
  const float factor = static_cast<float>(scale) * (number && !device ? *number : 1.0f);
  run("cast", x,
      Cast{from, to, in(x), out(y), x.numel(), factor, device ? number : nullptr, stochastic,
           static_cast<uint64_t>(seed), saturate});
  return y;
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "cast(Tensor x, int given, int wanted, float scale, Tensor? scale_tensor, bool stochastic, int seed, bool "
      "saturate) -> Tensor");
}
FINETUNE_KERNELS(m) { FINETUNE_KERNEL(m, "cast", cast); }

}  // namespace finetune
