#include "finetune/unscale_check_finite.h"

#include <algorithm>

#include "pieces.h"

namespace finetune {
namespace {

std::tuple<Tensor, Tensor> unscale_check_finite_(std::vector<Tensor> grads, Tensor inverse) {
  const char* op = "unscale_check_finite_";
  check(!grads.empty(), op, "expected a gradient");
  const float* by = one_float(inverse, op, "inverse_scale");
  const Pieces pieces = cut(grads, op, true);
  const Tensor found_inf = empty_f32(grads[0], {}), square = empty_f32(grads[0], {});
#if FINETUNE_DEVICE
  if (on_device(grads[0])) {
    const Tensor squares = empty_f32(square, {pieces.blocks}), overflow = empty_f32(square, {pieces.blocks});
    run_device(op, square,
               UnscaleCheckFiniteCuda{pieces.data(), pieces.count(), by, out<float>(squares), out<float>(overflow),
                                      pieces.blocks, out<float>(found_inf), out<float>(square)});
    return {found_inf, square};
  }
#endif
  std::vector<double> squares(pieces.count());
  std::vector<int32_t> overflow(pieces.count());
  run(op, UnscaleCheckFinite{pieces.data(), pieces.count(), *by, squares.data(), overflow.data()});
  const bool bad = std::find(overflow.begin(), overflow.end(), 1) != overflow.end();
  *square.mutable_data_ptr<float>() = static_cast<float>(sum(squares));
  *found_inf.mutable_data_ptr<float>() = bad ? 1.0f : 0.0f;
  return {found_inf, square};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def("unscale_check_finite_(Tensor(a!)[] grads, Tensor inverse_scale) -> (Tensor found_inf, Tensor square)");
}
FINETUNE_KERNELS(m) { FINETUNE_KERNEL(m, "unscale_check_finite_", unscale_check_finite_); }

}  // namespace finetune
