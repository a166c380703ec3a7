#include "finetune/quantized_linear.h"

#include "common.h"

namespace finetune {
namespace {

constexpr const char* kName = "quantized_linear";
using OptionalTensor = std::optional<Tensor>;

const void* scales_of(const PackedWeight& w, const OptionalTensor& t, const char* what) {
  if (!t) return nullptr;
  check(t->scalar_type() == (w.half_scales ? ScalarType::Half : ScalarType::Float), kName, what);
  check(t->is_contiguous() && t->numel() == w.panels() * w.groups() * kPanel, kName, what);
  return in(*t);
}

// The weight as its tensors in the layout "cpu" and what they do not say.
PackedWeight weight_of(const Tensor& codes, const OptionalTensor& scale, const OptionalTensor& minimum, int64_t format,
                       int64_t rows, int64_t depth, int64_t group) {
  check(format >= 0 && format <= 4 && rows >= 0 && (group == 0 || group == 16 || group == 32 || group == 64), kName,
        "formats are 0 … 4, groups 16, 32, 64 or 0");
  PackedWeight w{static_cast<WeightFormat>(format), rows, depth, group, nullptr, nullptr, nullptr, false};
  w.half_scales = scale && scale->scalar_type() == ScalarType::Half;
  check(codes.is_contiguous() &&
            codes.numel() * static_cast<int64_t>(codes.element_size()) == w.panels() * w.words() * kPanel * 4,
        kName, "the codes are not those of a weight packed for the CPU");
  check(scale.has_value() == (format > 1) && (!minimum || w.format == WeightFormat::int4), kName,
        "int8, int4 and nf4 have scales, only int4 has minima");
  w.codes = in(codes);
  w.scale = scales_of(w, scale, "the scales are not those of a weight packed for the CPU");
  w.minimum = scales_of(w, minimum, "the minima are not those of a weight packed for the CPU");
  return w;
}

Tensor quantized_linear(const Tensor& x_, const Tensor& codes, const OptionalTensor& scale,
                        const OptionalTensor& minimum, const OptionalTensor& bias_, int64_t format, int64_t rows,
                        int64_t group) {
  check(x_.dim() >= 1, kName, "x is (..., K)");
  const Rows x(x_);
  const PackedWeight weight = weight_of(codes, scale, minimum, format, rows, x.dim, group);
  OptionalTensor bias;
  if (bias_) {
    bias = torch::stable::contiguous(*bias_);
    check(bias->dim() == 1 && bias->size(0) == rows && bias->scalar_type() == x_.scalar_type(), kName,
          "bias is (N,) of x's dtype");
  }
  std::vector<int64_t> sizes(x_.sizes().begin(), x_.sizes().end());
  sizes.back() = rows;
  Tensor y = torch::stable::new_empty(x_, sizes);
  if (!y.numel()) return y;
  Tensor workspace = torch::stable::new_empty(x_, {prepared_bytes(x.rows, x.dim) + 64}, ScalarType::Byte);
  auto* at = static_cast<char*>(workspace.mutable_data_ptr());
  at += -reinterpret_cast<uintptr_t>(at) & 63;
  run(kName, x_,
      QuantizedLinear{dtype_of(x_), weight, in(x.tensor), x.stride, x.rows, bias ? in(*bias) : nullptr, out(y), at});
  return y;
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "quantized_linear(Tensor x, Tensor codes, Tensor? scale, Tensor? minimum, Tensor? bias, int format, int rows, "
      "int group) -> Tensor");
}
FINETUNE_KERNELS(m) { FINETUNE_KERNEL(m, "quantized_linear", quantized_linear); }

}  // namespace finetune
