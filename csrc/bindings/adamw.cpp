#include "finetune/adamw.h"

#include <cmath>

#include "common.h"

namespace finetune {
namespace {

using Tensors = std::vector<Tensor>;

void check_like(const Tensors& tensors, const Tensors& params, const char* what) {
  check(tensors.size() == params.size(), "adamw_", what);
  for (size_t i = 0; i < params.size(); ++i) {
    check(tensors[i].numel() == params[i].numel() && tensors[i].is_contiguous() && tensors[i].is_cpu(), "adamw_", what);
  }
}

float* moment(const Tensor& t) { return t.mutable_data_ptr<float>(); }  // raises unless float32

void adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors masters,
            std::optional<Tensor> grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
            int64_t step) {
  check_like(params, params, "params must be contiguous CPU tensors");
  check_like(exp_avgs, params, "exp_avgs must match params and be contiguous");
  check_like(exp_avg_sqs, params, "exp_avg_sqs must match params and be contiguous");
  if (!masters.empty()) check_like(masters, params, "masters must be empty or match params and be contiguous");
  for (Tensor& grad : grads) grad = torch::stable::contiguous(grad);
  check_like(grads, params, "grads must match params");
  check(step >= 1, "adamw_", "step counts from 1");
  check(!grad_scale || (grad_scale->numel() == 1 && grad_scale->is_cpu()), "adamw_", "grad_scale must be one number");

  std::vector<AdamWPiece> pieces;
  for (size_t i = 0; i < params.size(); ++i) {
    const DType param_dtype = dtype_of(params[i]), grad_dtype = dtype_of(grads[i]);
    const int64_t size = params[i].numel();
    char* param = static_cast<char*>(params[i].mutable_data_ptr());
    const char* grad = static_cast<const char*>(grads[i].const_data_ptr());
    for (int64_t at = 0; at < size; at += AdamW::piece) {
      pieces.push_back({param + at * bytes_of(param_dtype), grad + at * bytes_of(grad_dtype), moment(exp_avgs[i]) + at,
                        moment(exp_avg_sqs[i]) + at, masters.empty() ? nullptr : moment(masters[i]) + at,
                        std::min(AdamW::piece, size - at), param_dtype, grad_dtype});
    }
  }
  run("adamw_",
      AdamW{pieces.data(), static_cast<int64_t>(pieces.size()),
            grad_scale ? *grad_scale->const_data_ptr<float>() : 1.0f, static_cast<float>(1 - lr * weight_decay),
            static_cast<float>(beta1), static_cast<float>(1 - beta1), static_cast<float>(beta2),
            static_cast<float>(1 - beta2), static_cast<float>(lr / (1 - std::pow(beta1, static_cast<double>(step)))),
            static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step)))),
            static_cast<float>(eps)});
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] "
      "masters, Tensor? grad_scale, float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> "
      "()");
}
FINETUNE_KERNELS(m) { m.impl("adamw_", TORCH_BOX(&adamw_)); }

}  // namespace finetune
