#include "finetune/quantized_linear.h"

#include "common.h"
#include "finetune/quantized_linear_cuda.h"

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

#if FINETUNE_DEVICE
// The weight as its tensors in the layout "cuda", and the call.
void run_on_device(const Rows& x, const Tensor& codes, const OptionalTensor& scale, const OptionalTensor& minimum,
                   const OptionalTensor& bias, int64_t format, int64_t rows, int64_t group, const Tensor& y) {
  check(format >= 0 && format <= 4 && rows >= 0, kName, "formats are 0 … 4");
  constexpr int64_t chunks[] = {8, 4, 2, 1, 1};
  QuantizedLinearCuda a{};
  a.dtype = dtype_of(y);
  a.format = static_cast<WeightFormat>(format);
  a.rows = rows, a.depth = x.dim, a.panels = (rows + 31) / 32, a.tiles = (x.dim + 31) / 32;
  // a row of 4-bit codes that is no longer than a group still has one
  a.group = a.format == WeightFormat::int4 ? 32 : a.format == WeightFormat::nf4 ? 64 : group;
  check(a.format == WeightFormat::int8 ? group == 0 || group == 16 || group == 32 : group == 0 || group == a.group,
        kName, "groups are 16 or 32 (int8), 32 (int4), 64 (nf4), or 0");
  check(codes.is_contiguous() &&
            codes.numel() * static_cast<int64_t>(codes.element_size()) == a.panels * a.tiles * chunks[format] * 512,
        kName, "the codes are not those of a weight packed for a GPU");
  check(scale.has_value() == (format > 1) && !minimum, kName,
        "int8, int4 and nf4 have scales, and on a GPU the minima are among them");
  if (scale) {
    const int64_t groups = a.group ? (a.tiles * 32 + a.group - 1) / a.group : 1;
    a.half_scales = scale->scalar_type() == ScalarType::Half;
    a.minima = scale->dim() == 5;
    check((a.half_scales || scale->scalar_type() == ScalarType::Float) && scale->is_contiguous() &&
              (!a.minima || a.format == WeightFormat::int4) &&
              scale->numel() == a.panels * 32 * groups * (a.minima ? 2 : 1),
          kName, "the scales are not those of a weight packed for a GPU");
    a.scale = in(*scale);
  }
  a.codes = in(codes);
  check(((reinterpret_cast<uintptr_t>(a.codes) | reinterpret_cast<uintptr_t>(a.scale)) & 15) == 0, kName,
        "a weight packed for a GPU must begin at a multiple of 16 bytes");
  a.x = in(x.tensor), a.stride = x.stride, a.m = x.rows;
  a.bias = bias ? in(*bias) : nullptr;
  a.y = out(y);
  const Tensor sums = empty_f32(y, {a.sums_of_x()});
  a.sums = out<float>(sums);
  run_device(kName, y, a);
}
#endif

Tensor quantized_linear(const Tensor& x_, const Tensor& codes, const OptionalTensor& scale,
                        const OptionalTensor& minimum, const OptionalTensor& bias_, int64_t format, int64_t rows,
                        int64_t group) {
  check(x_.dim() >= 1, kName, "x is (..., K)");
  const Rows x(x_);
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
#if FINETUNE_DEVICE
  if (on_device(x_)) {
    run_on_device(x, codes, scale, minimum, bias, format, rows, group, y);
    return y;
  }
#endif
  const PackedWeight weight = weight_of(codes, scale, minimum, format, rows, x.dim, group);
  Tensor workspace = torch::stable::new_empty(x_, {prepared_bytes(x.rows, x.dim) + 64}, ScalarType::Byte);
  auto* at = static_cast<char*>(workspace.mutable_data_ptr());
  at += -reinterpret_cast<uintptr_t>(at) & 63;
  check(x_.is_cpu(), kName, "expected CPU tensors");
  run(kName,
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
