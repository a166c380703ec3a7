// A head's keys or values of one token on their way into the pool, quantized to int8 or e4m3 where it has 8 bits.
#pragma once

#include "eight_bit.h"
#include "largest.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

// One head of a token into the pool. `dim` elements; `scale` is where its scale belongs.
template <class T, class C>
FINETUNE_INLINE void store_head(const T* x, C* y, float* scale, int64_t dim) {
  if constexpr (std::is_same_v<T, C>) {
    std::memcpy(y, x, dim * sizeof(T));
  } else if constexpr (std::is_same_v<C, bf16>) {
    for_each_vector(dim, [&](int64_t i, auto get, auto put) { put(y + i, get(x + i)); });
  } else {
    const float largest = largest_magnitude(x, dim);
    const float s = largest / kLargest<C>;
    *scale = s;
    const bool usable = s > 0 && s <= 3.4028235e38f;
    const vf limit = set1(kLargest<C>);
    for_each_vector(dim, [&](int64_t i, auto get, auto put) {
      put(y + i, usable ? vmax(-limit, vmin(limit, get(x + i) / s)) : vf{});
    });
  }
}

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
