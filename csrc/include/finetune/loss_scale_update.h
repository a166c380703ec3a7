// A step of dynamic loss scaling; the definition is finetune/ops/loss_scale_update.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

struct LossScaleUpdate {
  float* scale;
  int32_t *growth_tracker, *hysteresis_tracker;
  const float* found_inf;
  bool deepspeed;
  double growth_factor, backoff_factor;
  int64_t growth_interval;
  int32_t hysteresis;
  float min_scale;
  bool consecutive_hysteresis;
};

#if defined(__CUDACC__)
#define FINETUNE_LOSS_SCALE __host__ __device__ __forceinline__
#else
#define FINETUNE_LOSS_SCALE inline __attribute__((always_inline))
#endif

// The rule, for a CPU's or a GPU's single thread. A scale that would overflow stays as it is.
FINETUNE_LOSS_SCALE void update_loss_scale(const LossScaleUpdate& a, float found_inf) {
  const auto times = [](float scale, double factor) { return static_cast<float>(scale * factor); };
  const auto back_off = [&] {
    const float next = times(*a.scale, a.backoff_factor);
    *a.scale = next < a.min_scale ? a.min_scale : next;
  };
  const auto grow = [&] {
    const float next = times(*a.scale, a.growth_factor);
    if (next <= 3.402823466e38f) *a.scale = next;
  };
  if (a.deepspeed) {
    if (found_inf > 0) {
      if (a.hysteresis == 1 || *a.hysteresis_tracker == 1) {
        back_off();
      } else {
        --*a.hysteresis_tracker;
      }
      *a.growth_tracker = 0;
      return;
    }
    const bool grows = *a.growth_tracker > 0 && *a.growth_tracker % a.growth_interval == 0;
    if (grows || a.consecutive_hysteresis) *a.hysteresis_tracker = a.hysteresis;
    if (grows) grow();
    ++*a.growth_tracker;
    return;
  }
  if (found_inf > 0) {
    *a.growth_tracker = 0;
    if (--*a.hysteresis_tracker <= 0) back_off();
    return;
  }
  *a.hysteresis_tracker = a.hysteresis;
  if (++*a.growth_tracker == a.growth_interval) {
    grow();
    *a.growth_tracker = 0;
  }
}

}  // namespace finetune
