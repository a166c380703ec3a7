#include "finetune/loss_scale_update.h"

#include "common.h"

namespace finetune {
namespace {

int32_t* counter(const Tensor& t) {
  check(t.numel() == 1 && t.scalar_type() == ScalarType::Int, "loss_scale_update_",
        "the trackers must be one int32 each");
  return inout<int32_t>(t);
}

void loss_scale_update_(Tensor scale, Tensor growth_tracker, Tensor hysteresis_tracker, Tensor found_inf,
                        bool deepspeed, double growth_factor, double backoff_factor, int64_t growth_interval,
                        int64_t hysteresis, double min_scale, bool consecutive_hysteresis) {
  check(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float, "loss_scale_update_",
        "scale must be one float32 number");
  check(growth_interval >= 1 && hysteresis >= 1 && hysteresis < 1 << 30, "loss_scale_update_",
        "growth_interval and hysteresis count from 1");
  run("loss_scale_update_", scale,
      LossScaleUpdate{inout<float>(scale), counter(growth_tracker), counter(hysteresis_tracker),
                      one_float(found_inf, "loss_scale_update_", "found_inf"), deepspeed, growth_factor, backoff_factor,
                      growth_interval, static_cast<int32_t>(hysteresis), static_cast<float>(min_scale),
                      consecutive_hysteresis});
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "loss_scale_update_(Tensor(a!) scale, Tensor(b!) growth_tracker, Tensor(c!) hysteresis_tracker, Tensor "
      "found_inf, bool deepspeed, float growth_factor, float backoff_factor, int growth_interval, int hysteresis, "
      "float min_scale, bool consecutive_hysteresis) -> ()");
}
FINETUNE_KERNELS(m) { FINETUNE_KERNEL(m, "loss_scale_update_", loss_scale_update_); }

}  // namespace finetune
