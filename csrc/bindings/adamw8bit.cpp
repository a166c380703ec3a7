#include "finetune/adamw8bit.h"

#include "adamw_step.h"

namespace finetune {
namespace {

using Tensors = std::vector<Tensor>;

// Like the parameters, or one element for each of their blocks.
void check_states(const Tensors& tensors, const Tensors& params, ScalarType dtype, bool per_block, const char* what) {
  check(tensors.size() == params.size(), "adamw8bit_", what);
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t size = params[i].numel(), block = AdamW8bit::block;
    check(tensors[i].numel() == (per_block ? (size + block - 1) / block : size) && tensors[i].scalar_type() == dtype &&
              tensors[i].is_contiguous(),
          "adamw8bit_", what);
  }
}

void adamw8bit_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_maxs, Tensors exp_avg_sqs,
                Tensors exp_avg_sq_maxs, Tensors masters, Tensor maps, Tensor middles, double grad_scale,
                std::optional<Tensor> scale_tensor, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step) {
  if (params.empty()) return;
  for (const Tensor& p : params) {
    check(p.is_contiguous(), "adamw8bit_", "params must be contiguous");
  }
  check_states(exp_avgs, params, ScalarType::Byte, false, "exp_avgs must be uint8, match params and be contiguous");
  check_states(exp_avg_sqs, params, ScalarType::Byte, false,
               "exp_avg_sqs must be uint8, match params and be contiguous");
  check_states(exp_avg_maxs, params, ScalarType::Float, true,
               "exp_avg_maxs must have a float32 for every 256 elements");
  check_states(exp_avg_sq_maxs, params, ScalarType::Float, true,
               "exp_avg_sq_maxs must have a float32 for every 256 elements");
  if (!masters.empty()) {
    check_states(masters, params, ScalarType::Float, false,
                 "masters must be empty or float32, match params and be contiguous");
  }
  check(grads.size() == params.size(), "adamw8bit_", "grads must match params");
  for (size_t i = 0; i < grads.size(); ++i) {
    grads[i] = torch::stable::contiguous(grads[i]);
    check(grads[i].numel() == params[i].numel(), "adamw8bit_", "grads must match params");
  }
  for (const Tensor& table : {maps, middles}) {
    check(table.numel() == 512 && table.scalar_type() == ScalarType::Float && table.is_contiguous(), "adamw8bit_",
          "maps and middles must be (2, 256) float32");
  }
  const AdamWStep numbers =
      adamw_step("adamw8bit_", params[0], grad_scale, scale_tensor, lr, beta1, beta2, eps, weight_decay, step);

  std::vector<AdamW8bitPiece> pieces;
  for (size_t i = 0; i < params.size(); ++i) {
    const DType param_dtype = dtype_of(params[i]), grad_dtype = dtype_of(grads[i]);
    const int64_t size = params[i].numel(), most = on_device(params[0]) ? size : AdamW8bit::piece;
    char* param = inout<char>(params[i]);
    const char* grad = in<char>(grads[i]);
    auto *m = inout<uint8_t>(exp_avgs[i]), *v = inout<uint8_t>(exp_avg_sqs[i]);
    auto *m_max = inout<float>(exp_avg_maxs[i]), *v_max = inout<float>(exp_avg_sq_maxs[i]);
    float* master = masters.empty() ? nullptr : inout<float>(masters[i]);
    for (int64_t at = 0; at < size; at += most) {
      const int64_t block = at / AdamW8bit::block;
      pieces.push_back({param + at * bytes_of(param_dtype), grad + at * bytes_of(grad_dtype), m + at, v + at,
                        m_max + block, v_max + block, master ? master + at : nullptr, std::min(most, size - at),
                        param_dtype, grad_dtype});
    }
  }
  run("adamw8bit_", params[0],
      AdamW8bit{numbers, pieces.data(), static_cast<int64_t>(pieces.size()), in<float>(maps), in<float>(middles)});
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "adamw8bit_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_maxs, Tensor(d!)[] "
      "exp_avg_sqs, Tensor(e!)[] exp_avg_sq_maxs, Tensor(f!)[] masters, Tensor maps, Tensor middles, float grad_scale, "
      "Tensor? scale_tensor, float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> ()");
}
FINETUNE_KERNELS(m) { FINETUNE_KERNEL(m, "adamw8bit_", adamw8bit_); }

}  // namespace finetune
