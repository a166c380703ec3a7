#include "finetune/global_norm.h"

#include <cmath>

#include "common.h"

namespace finetune {
namespace {

Tensor global_norm(std::vector<Tensor> tensors) {
  check(!tensors.empty(), "global_norm", "expected a tensor");
  const bool device = on_device(tensors[0]);
  std::vector<NormPiece> pieces;
  [[maybe_unused]] int64_t blocks = 0;
  for (Tensor& tensor : tensors) {
    check(same_device(tensor, tensors[0]), "global_norm", "tensors must be on one device");
    tensor = torch::stable::contiguous(tensor);
    const DType dtype = dtype_of(tensor, true);
    const char* data = in<char>(tensor);
    const int64_t size = tensor.numel(), most = device ? size : GlobalNorm::piece;
    for (int64_t at = 0; at < size; at += most) {
      pieces.push_back({data + at * bytes_of(dtype), std::min(most, size - at), dtype});
    }
    blocks += (size + GlobalNormCuda::block - 1) / GlobalNormCuda::block;
  }
  const auto count = static_cast<int64_t>(pieces.size());
  const Tensor norm = empty_f32(tensors[0], {});
#if FINETUNE_DEVICE
  if (device) {
    const Tensor squares = empty_f32(tensors[0], {blocks});
    run_device("global_norm", tensors[0],
               GlobalNormCuda{pieces.data(), count, out<float>(squares), blocks, out<float>(norm)});
    return norm;
  }
#endif
  std::vector<double> squares(pieces.size());
  run("global_norm", GlobalNorm{pieces.data(), squares.data(), count});
  double total = 0;
  for (const double square : squares) total += square;
  *norm.mutable_data_ptr<float>() = static_cast<float>(std::sqrt(total));
  return norm;
}

}  // namespace

FINETUNE_SCHEMAS(m) { m.def("global_norm(Tensor[] tensors) -> Tensor"); }
FINETUNE_KERNELS(m) { m.impl("global_norm", TORCH_BOX(&global_norm)); }

}  // namespace finetune
