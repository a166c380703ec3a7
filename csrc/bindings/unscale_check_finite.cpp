#include "finetune/unscale_check_finite.h"

#include "common.h"

namespace finetune {
namespace {

std::tuple<Tensor, Tensor> unscale_check_finite_(std::vector<Tensor> grads, Tensor inverse) {
  const char* op = "unscale_check_finite_";
  check(!grads.empty(), op, "expected a gradient");
  const bool device = on_device(grads[0]);
  const float* by = one_float(inverse, grads[0], op, "inverse_scale");
  std::vector<UnscalePiece> pieces;
  [[maybe_unused]] int64_t blocks = 0;
  for (const Tensor& grad : grads) {
    check(same_device(grad, grads[0]) && grad.is_contiguous(), op, "grads must be contiguous and on one device");
    const DType dtype = dtype_of(grad, true);
    char* data = inout<char>(grad);
    const int64_t size = grad.numel(), most = device ? size : UnscaleCheckFinite::piece;
    for (int64_t at = 0; at < size; at += most) {
      pieces.push_back({data + at * bytes_of(dtype), std::min(most, size - at), dtype});
    }
    blocks += (size + UnscaleCheckFiniteCuda::block - 1) / UnscaleCheckFiniteCuda::block;
  }
  const auto count = static_cast<int64_t>(pieces.size());
  const Tensor found_inf = empty_f32(grads[0], {}), square = empty_f32(grads[0], {});
#if FINETUNE_DEVICE
  if (device) {
    const Tensor squares = empty_f32(grads[0], {blocks}), overflow = empty_f32(grads[0], {blocks});
    run_device(op, grads[0],
               UnscaleCheckFiniteCuda{pieces.data(), count, by, out<float>(squares), out<float>(overflow), blocks,
                                      out<float>(found_inf), out<float>(square)});
    return {found_inf, square};
  }
#endif
  std::vector<double> squares(pieces.size());
  std::vector<int32_t> overflow(pieces.size());
  run(op, UnscaleCheckFinite{pieces.data(), count, *by, squares.data(), overflow.data()});
  double total = 0;
  bool bad = false;
  for (size_t i = 0; i < pieces.size(); ++i) {
    total += squares[i];
    bad |= overflow[i] != 0;
  }
  *square.mutable_data_ptr<float>() = static_cast<float>(total);
  *found_inf.mutable_data_ptr<float>() = bad ? 1.0f : 0.0f;
  return {found_inf, square};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def("unscale_check_finite_(Tensor(a!)[] grads, Tensor inverse_scale) -> (Tensor found_inf, Tensor square)");
}
FINETUNE_KERNELS(m) { m.impl("unscale_check_finite_", TORCH_BOX(&unscale_check_finite_)); }

}  // namespace finetune
