#include "adamw_step.h"

namespace finetune {
namespace {

using Tensors = std::vector<Tensor>;

void check_like(const Tensors& tensors, const Tensors& params, const char* what) {
  check(tensors.size() == params.size(), "adamw_", what);
  for (size_t i = 0; i < params.size(); ++i) {
    check(tensors[i].numel() == params[i].numel() && tensors[i].is_contiguous(), "adamw_", what);
  }
}

float* moment(const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float, "adamw_", "moments and masters must be float32");
  return inout<float>(t);
}

void adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors masters, double grad_scale,
            std::optional<Tensor> scale_tensor, double lr, double beta1, double beta2, double eps, double weight_decay,
            int64_t step) {
  if (params.empty()) return;
  check_like(params, params, "params must be contiguous");
  check_like(exp_avgs, params, "exp_avgs must match params and be contiguous");
  check_like(exp_avg_sqs, params, "exp_avg_sqs must match params and be contiguous");
  if (!masters.empty()) check_like(masters, params, "masters must be empty or match params and be contiguous");
  for (Tensor& grad : grads) grad = torch::stable::contiguous(grad);
  check_like(grads, params, "grads must match params");
  const AdamWStep numbers =
      adamw_step("adamw_", params[0], grad_scale, scale_tensor, lr, beta1, beta2, eps, weight_decay, step);

  std::vector<AdamWPiece> pieces;
  for (size_t i = 0; i < params.size(); ++i) {
    const DType param_dtype = dtype_of(params[i]), grad_dtype = dtype_of(grads[i]);
    const int64_t size = params[i].numel(), most = on_device(params[0]) ? size : AdamW::piece;
    char* param = inout<char>(params[i]);
    const char* grad = in<char>(grads[i]);
    float *m = moment(exp_avgs[i]), *v = moment(exp_avg_sqs[i]),
          *master = masters.empty() ? nullptr : moment(masters[i]);
    for (int64_t at = 0; at < size; at += most) {
      pieces.push_back({param + at * bytes_of(param_dtype), grad + at * bytes_of(grad_dtype), m + at, v + at,
                        master ? master + at : nullptr, std::min(most, size - at), param_dtype, grad_dtype});
    }
  }
  run("adamw_", params[0], AdamW{numbers, pieces.data(), static_cast<int64_t>(pieces.size())});
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] "
      "masters, float grad_scale, Tensor? scale_tensor, float lr, float beta1, float beta2, float eps, float "
      "weight_decay, int step) -> ()");
}
FINETUNE_KERNELS(m) { FINETUNE_KERNEL(m, "adamw_", adamw_); }

}  // namespace finetune
