// The numbers of an AdamW step as both bindings compute them, in double precision.
#pragma once

#include <cmath>

#include "common.h"
#include "finetune/adamw.h"

namespace finetune {

inline AdamWStep adamw_step(const char* op, const Tensor& param, double grad_scale, const std::optional<Tensor>& tensor,
                            double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  check(step >= 1, op, "step counts from 1");
  const float* scale = tensor ? one_float(*tensor, op, "grad_scale") : nullptr;
  const bool device = on_device(param);
  const double bias1 = 1 - std::pow(beta1, static_cast<double>(step)),
               bias2 = 1 - std::pow(beta2, static_cast<double>(step));
  return {static_cast<float>(grad_scale) * (scale && !device ? *scale : 1.0f),
          device ? scale : nullptr,
          static_cast<float>(1 - lr * weight_decay),
          static_cast<float>(beta1),
          static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(lr / bias1),
          static_cast<float>(1 / std::sqrt(bias2)),
          static_cast<float>(eps)};
}

}  // namespace finetune
