// A step of dynamic loss scaling on the device: whether gradients overflowed is never asked by the host. One thread;
// the rule is in finetune/loss_scale_update.h, for both kinds of device.
//
// Memory: reads and writes four numbers; the launch is all it costs.
#include "finetune/loss_scale_update.h"

#include "device/launch.cuh"

namespace finetune {
namespace {

__global__ void update(LossScaleUpdate a) { update_loss_scale(a, *a.found_inf); }

}  // namespace

template <>
Status launch_cuda(const LossScaleUpdate& a, void* stream) {
  return launch(update, dim3(1), dim3(1), 0, stream, a);
}

}  // namespace finetune
