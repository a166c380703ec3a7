#include "finetune/global_norm.h"

#include <cmath>

#include "pieces.h"

namespace finetune {
namespace {

Tensor global_norm(std::vector<Tensor> tensors) {
  const char* op = "global_norm";
  check(!tensors.empty(), op, "expected a tensor");
  for (Tensor& tensor : tensors) tensor = torch::stable::contiguous(tensor);
  const Pieces pieces = cut(tensors, op, false);
  const Tensor norm = empty_f32(tensors[0], {});
#if FINETUNE_DEVICE
  if (on_device(tensors[0])) {
    const Tensor squares = empty_f32(norm, {pieces.blocks});
    run_device(op, norm,
               GlobalNormCuda{pieces.data(), pieces.count(), out<float>(squares), pieces.blocks, out<float>(norm)});
    return norm;
  }
#endif
  std::vector<double> squares(pieces.count());
  run(op, GlobalNorm{pieces.data(), pieces.count(), squares.data()});
  *norm.mutable_data_ptr<float>() = static_cast<float>(std::sqrt(sum(squares)));
  return norm;
}

}  // namespace

FINETUNE_SCHEMAS(m) { m.def("global_norm(Tensor[] tensors) -> Tensor"); }
FINETUNE_KERNELS(m) { FINETUNE_KERNEL(m, "global_norm", global_norm); }

}  // namespace finetune
