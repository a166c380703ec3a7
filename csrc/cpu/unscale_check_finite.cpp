// Gradients unscaled, checked and measured in one parallel loop over all tensors.
//
// Memory: reads and writes every element once, 8 bytes in fp32; about five operations an element: memory bandwidth is
// the roof.
#include "finetune/unscale_check_finite.h"

#include "pieces.h"
#include "squares.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

Status unscale_check_finite(const UnscaleCheckFinite& a) {
  return for_each_piece(a.pieces, a.count, [&](int64_t at, auto* grad, int64_t size) {
    vu bad{};
    a.squares[at] = sum_squares(size, [&](int64_t i, auto get, auto put) {
      const vf g = get(grad + i), out = g * a.inverse;
      bad |= ((vu)g & 0x7fffffffu) + 0x00800000u;  // the top bit, where the exponent is all ones
      put(grad + i, out);
      return out;
    });
    uint32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= bad[lane];
    a.overflow[at] = any >> 31;
  });
}

FINETUNE_REGISTER(UnscaleCheckFinite, unscale_check_finite);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
