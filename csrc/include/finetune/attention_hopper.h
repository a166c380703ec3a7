// Attention's forward pass by the kernel of sm_90 (csrc/cuda/attention_hopper.cu).
#pragma once

#include "finetune/attention.h"

namespace finetune {

struct AttentionHopper : AttentionCuda {};

// Why that kernel does not take these arguments, or is not for the current GPU; null if it is for both.
const char* why_not_hopper(const AttentionCuda& a);

}  // namespace finetune
