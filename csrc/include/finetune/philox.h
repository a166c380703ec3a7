// Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11): random words as a function
// of a counter and a key, so that every backend, thread and vector width draws the same for the same element. Element i
// takes word i mod 4 of counter (i / 4, 0) under the key `seed`. Written once: for numbers and for vectors of numbers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FINETUNE_PHILOX __host__ __device__ __forceinline__
#else
#define FINETUNE_PHILOX inline __attribute__((always_inline))
#endif

namespace finetune {

// The 64 bits of a product of 32-bit numbers. The CPU kernels have one for vectors (csrc/cpu/formats.h).
struct WideProduct {
  FINETUNE_PHILOX void operator()(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) const {
    const uint64_t product = uint64_t{a} * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

// `words`: the counter, and then what was drawn.
template <int kRounds = 10, class U, class Product = WideProduct>
FINETUNE_PHILOX void philox(U (&words)[4], uint64_t seed, Product multiply = {}) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    U high0, low0, high1, low1;
    multiply(words[0], 0xD2511F53u, high0, low0);
    multiply(words[2], 0xCD9E8D57u, high1, low1);
    words[0] = high1 ^ words[1] ^ key0;
    words[1] = low1;
    words[2] = high0 ^ words[3] ^ key1;
    words[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace finetune
