// The pairs of types of tokens and of the cache that holds them.
#pragma once

#include "finetune/kv_cache.h"
#include "launch.cuh"

namespace finetune {

// Calls f(t, c) with a value of the tokens' type and one of the cache's.
template <class F>
Status for_types(DType dtype, Stored stored, F&& f) {
  return for_dtype(dtype, [&](auto t) {
    switch (stored) {
      case Stored::same:
        return f(t, t);
      case Stored::int8:
        return f(t, int8_t{});
      case Stored::fp8:
        return f(t, fp8{});
    }
    return Status::unsupported;
  });
}

// Is p a multiple of `bytes`, a power of two?
__device__ __forceinline__ bool is_aligned(const void* p, size_t bytes) {
  return (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) == 0;
}

}  // namespace finetune
