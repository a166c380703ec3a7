// The second half of clipping, where the norm is too large: g ← g · scale, all tensors in one parallel loop. The first
// is global_norm.cpp.
//
// Memory: reads and writes every element once, 8 bytes in fp32; one FLOP: memory bandwidth is the roof.
#include "finetune/clip_grad_norm.h"

#include "pieces.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

Status grad_scale(const GradScale& a) {
  return for_each_piece(a.pieces, a.count, [&](int64_t, auto* grad, int64_t size) {
    for_each_vector(size, [&](int64_t i, auto get, auto put) { put(grad + i, get(grad + i) * a.scale); });
  });
}

FINETUNE_REGISTER(GradScale, grad_scale);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
