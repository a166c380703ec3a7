// The largest magnitude of a row, by which it is scaled to integers.
#pragma once

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

// Of `count` elements; NaN if one is NaN, 0 if there is none.
template <class T>
FINETUNE_INLINE float largest_magnitude(const T* x, int64_t count) {
  vi top{};  // as integers, in which order a NaN is above everything
  for_each_vector(count, [&](int64_t i, auto get, auto) {
    const vi size = (vi)get(x + i) & 0x7fffffff;
    top = size > top ? size : top;
  });
  int32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = top[i] > most ? top[i] : most;
  float largest;
  std::memcpy(&largest, &most, sizeof largest);
  return largest;
}

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
