// A step of dynamic loss scaling: a few operations on four numbers (finetune/loss_scale_update.h has the rule).
#include "finetune/loss_scale_update.h"

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

Status loss_scale_update(const LossScaleUpdate& a) {
  update_loss_scale(a, *a.found_inf);
  return Status::ok;
}

FINETUNE_REGISTER(LossScaleUpdate, loss_scale_update);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
