// Gradients unscaled, checked and measured in one parallel loop over all tensors.
//
// Memory: reads and writes every element once, 8 bytes in fp32; about five operations an element: memory bandwidth is
// the roof.
#include "finetune/unscale_check_finite.h"

#include "formats.h"
#include "squares.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

template <class T>
void unscale(const UnscaleCheckFinite& a, int64_t at) {
  T* grad = static_cast<T*>(a.pieces[at].data);
  vu bad{};
  a.squares[at] = sum_squares(a.pieces[at].size, [&](int64_t i, auto get, auto put) {
    const vf g = get(grad + i), out = g * a.inverse;
    bad |= ((vu)g & 0x7fffffffu) + 0x00800000u;  // the top bit, where the exponent is all ones
    put(grad + i, out);
    return out;
  });
  uint32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= bad[lane];
  a.overflow[at] = any >> 31;
}

Status unscale_check_finite(const UnscaleCheckFinite& a) {
  parallel_for(a.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      switch (a.pieces[at].dtype) {
        case DType::f32:
          unscale<float>(a, at);
          break;
        case DType::bf16:
          unscale<bf16>(a, at);
          break;
        case DType::f16:
          unscale<f16>(a, at);
          break;
        case DType::f64:  // the binding lets none through
          break;
      }
    }
  });
  return Status::ok;
}

FINETUNE_REGISTER(UnscaleCheckFinite, unscale_check_finite);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
