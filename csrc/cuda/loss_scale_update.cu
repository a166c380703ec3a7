// A step of dynamic loss scaling on the device: whether gradients overflowed is never asked by the host. One thread;
// the rule is in finetune/loss_scale_update.h, for both kinds of device.
//
// Memory: reads and writes four numbers; the launch is all it costs.
// Faults: loss_scale_update.flag_ignored loss_scale_update.always_overflow loss_scale_update.other_policy
#include "finetune/loss_scale_update.h"
#include "device/launch.cuh"

namespace finetune {
namespace {

__global__ void update(LossScaleUpdate a) {
  const float found = BUG("loss_scale_update.flag_ignored") ? 0.0f : *a.found_inf;
  if (BUG("loss_scale_update.other_policy")) a.deepspeed = !a.deepspeed;
  update_loss_scale(a, BUG("loss_scale_update.always_overflow") ? 1.0f : found);
}

}  // namespace

template <>
Status launch_cuda(const LossScaleUpdate& a, void* stream) {
  return launch(update, dim3(1), dim3(1), 0, stream, a);
}

}  // namespace finetune
