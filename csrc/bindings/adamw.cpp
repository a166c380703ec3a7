#include "finetune/adamw.h"

#include <cmath>

#include "common.h"

namespace finetune {
namespace {

using Tensors = std::vector<Tensor>;

void check_like(const Tensors& tensors, const Tensors& params, const char* what) {
  check(tensors.size() == params.size(), "adamw_", what);
  for (size_t i = 0; i < params.size(); ++i) {
    check(tensors[i].numel() == params[i].numel() && tensors[i].is_contiguous() && same_device(tensors[i], params[0]),
          "adamw_", what);
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
  check_like(params, params, "params must be contiguous and on one device");
  check_like(exp_avgs, params, "exp_avgs must match params and be contiguous");
  check_like(exp_avg_sqs, params, "exp_avg_sqs must match params and be contiguous");
  if (!masters.empty()) check_like(masters, params, "masters must be empty or match params and be contiguous");
  for (Tensor& grad : grads) grad = torch::stable::contiguous(grad);
  check_like(grads, params, "grads must match params");
  check(step >= 1, "adamw_", "step counts from 1");
  const bool device = on_device(params[0]);
  const float* scale = scale_tensor ? one_float(*scale_tensor, params[0], "adamw_", "grad_scale") : nullptr;

  std::vector<AdamWPiece> pieces;
  for (size_t i = 0; i < params.size(); ++i) {
    const DType param_dtype = dtype_of(params[i]), grad_dtype = dtype_of(grads[i]);
    const int64_t size = params[i].numel(), most = device ? size : AdamW::piece;
    char* param = inout<char>(params[i]);
    const char* grad = in<char>(grads[i]);
    float *m = moment(exp_avgs[i]), *v = moment(exp_avg_sqs[i]),
          *master = masters.empty() ? nullptr : moment(masters[i]);
    for (int64_t at = 0; at < size; at += most) {
      pieces.push_back({param + at * bytes_of(param_dtype), grad + at * bytes_of(grad_dtype), m + at, v + at,
                        master ? master + at : nullptr, std::min(most, size - at), param_dtype, grad_dtype});
    }
  }
  const float factor = static_cast<float>(grad_scale) * (scale && !device ? *scale : 1.0f);
  run("adamw_", params[0],
      AdamW{pieces.data(), static_cast<int64_t>(pieces.size()), factor, device ? scale : nullptr,
            static_cast<float>(1 - lr * weight_decay), static_cast<float>(beta1), static_cast<float>(1 - beta1),
            static_cast<float>(beta2), static_cast<float>(1 - beta2),
            static_cast<float>(lr / (1 - std::pow(beta1, static_cast<double>(step)))),
            static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step)))),
            static_cast<float>(eps)});
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] "
      "masters, float grad_scale, Tensor? scale_tensor, float lr, float beta1, float beta2, float eps, float "
      "weight_decay, int step) -> ()");
}
FINETUNE_KERNELS(m) { m.impl("adamw_", TORCH_BOX(&adamw_)); }

}  // namespace finetune
