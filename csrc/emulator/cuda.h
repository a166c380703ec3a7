// CUDA C++ for g++: what nvcc gives the kernels of csrc/cuda, in terms of the emulator. csrc/cuda/device/cuda.cuh includes it
// where there is no nvcc.
#pragma once

#include <math.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#if defined(EMULATOR_checked)  // so that an access has the line of the kernel that asked for it
#define __forceinline__ inline __attribute__((always_inline))
#else
#define __forceinline__ inline
#endif
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// g++ would make a private variable of it: SHARED and DYN_SHARED (csrc/cuda/device/launch.cuh) are shared on both sides.
#define __shared__ static_assert(false, "use SHARED or DYN_SHARED instead of __shared__");

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())
constexpr int warpSize = 32;

// --- vectors

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// --- arithmetic

namespace emulator {
inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }  // .ftz
}  // namespace emulator

using std::max;
using std::min;
inline float max(float a, float b) { return std::fmax(a, b); }  // of a NaN and a number, the number
inline float min(float a, float b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
// As the hardware makes them, of 2^x and log2: the product's rounding is most of their error.
inline float __expf(float x) { return std::exp2(x * 1.44269504f); }
inline float __logf(float x) { return std::log2(x) * 0.693147181f; }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) {  // of a divisor from 2^126 on: 0, and NaN of an infinite x
  const float size = std::fabs(y);
  if (!(size > 0x1p126f) || std::isinf(size)) return x / y;
  return std::isinf(x) ? NAN : std::copysign(0.0f, x) * std::copysign(1.0f, y);
}
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float2int_rn(float x) {  // saturates; NaN is 0
  if (!(x < 0x1p31f)) return std::isnan(x) ? 0 : 0x7fffffff;
  return x < -0x1p31f ? -0x7fffffff - 1 : static_cast<int>(std::nearbyint(x));
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }

// --- loads and stores that name their state space

template <class T>
EMULATOR_UNCHECKED T __ldg(const T* p, emulator::Site site = emulator::Site::here()) {
  emulator::require_global(p, alignof(T), "__ldg", site);
  emulator::touch_constant(p, sizeof(T), site);
  return *p;
}
template <class T>
EMULATOR_UNCHECKED void __stwb(T* p, std::type_identity_t<T> v, emulator::Site site = emulator::Site::here()) {
  emulator::require_global(p, alignof(T), "a global store", site);
  emulator::touch(p, sizeof(T), emulator::Access::write, site);
  *p = v;
}
namespace emulator {
template <class T>
EMULATOR_UNCHECKED void store_shared(T* p, const T& v, Site site) {
  require_shared(p, alignof(T), "a shared store", site);
  touch(p, sizeof(T), Access::write, site);
  *p = v;
}
}  // namespace emulator

// --- warps

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::block_barrier(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::here()) {
  emulator::warp_barrier(mask, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emulator {

template <class T>
struct Exchange {
  T value, result;
  int source;
};

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Exchange<T> mine{value, value, source};
  collective(
      mask,
      [](void* const* parts, uint32_t lanes, Site where) {
        for (int lane = 0; lane < 32; ++lane) {
          if (!(lanes >> lane & 1)) continue;
          auto* part = static_cast<Exchange<T>*>(parts[lane]);
          if (!parts[part->source]) fault("a shuffle from a lane outside of its mask", where);
          part->result = static_cast<Exchange<T>*>(parts[part->source])->value;
        }
      },
      &mine, site, "shuffle");
  return mine.result;
}

struct Vote {
  bool yes;
  uint32_t ballot;
};

inline uint32_t vote(unsigned mask, bool yes, Site site) {
  Vote mine{yes, 0};
  collective(
      mask,
      [](void* const* parts, uint32_t lanes, Site) {
        uint32_t ballot = 0;
        for (int lane = 0; lane < 32; ++lane) {
          if (lanes >> lane & 1) ballot |= uint32_t{static_cast<Vote*>(parts[lane])->yes} << lane;
        }
        for (int lane = 0; lane < 32; ++lane) {
          if (lanes >> lane & 1) static_cast<Vote*>(parts[lane])->ballot = ballot;
        }
      },
      &mine, site, "vote");
  return mine.ballot;
}

inline int width_of(int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fault("a shuffle whose width is no power of two up to 32", site);
  return width;
}

// The lane that a shuffle within groups of `width` lanes reads, or the caller's own where that is outside the group.
inline int within(int source, int width, Site site) {
  const int lane = static_cast<int>(lane_index()), first = lane / width_of(width, site) * width;
  return source >= first && source < first + width ? source : lane;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int first = static_cast<int>(emulator::lane_index()) / emulator::width_of(width, site) * width;
  return emulator::shuffle(mask, v, first + (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int lane = static_cast<int>(emulator::lane_index()), source = lane ^ bits;
  emulator::width_of(width, site);
  return emulator::shuffle(mask, v, source / width <= lane / width ? source & 31 : lane, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int lane = static_cast<int>(emulator::lane_index());
  return emulator::shuffle(mask, v, emulator::within(lane + static_cast<int>(by), width, site), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int lane = static_cast<int>(emulator::lane_index());
  return emulator::shuffle(mask, v, emulator::within(lane - static_cast<int>(by), width, site), site);
}
inline unsigned __ballot_sync(unsigned mask, int yes, emulator::Site site = emulator::Site::here()) {
  return emulator::vote(mask, yes != 0, site);
}
inline int __any_sync(unsigned mask, int yes, emulator::Site site = emulator::Site::here()) {
  return emulator::vote(mask, yes != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int yes, emulator::Site site = emulator::Site::here()) {
  return emulator::vote(mask, yes != 0, site) == mask;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned v, emulator::Site site = emulator::Site::here()) {
  unsigned sum = 0;
  for (int lane = 0; lane < 32; ++lane) {  // a lane outside of the mask adds nothing
    const unsigned other =
        emulator::shuffle(mask, v, mask >> lane & 1 ? lane : static_cast<int>(emulator::lane_index()), site);
    sum += mask >> lane & 1 ? other : 0;
  }
  return sum;
}

// --- atomics: fibers do not preempt each other, so only the checks must know

template <class T, class F>
EMULATOR_UNCHECKED T emulated_atomic(T* p, F&& update, emulator::Site site) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  emulator::require_memory(p, sizeof(T), "an atomic", site);
  emulator::touch(p, sizeof(T), emulator::Access::atomic, site);
  T old;
  std::memcpy(&old, p, sizeof(T));
  const T now = update(old);
  std::memcpy(p, &now, sizeof(T));
  return old;
}
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v, emulator::Site site = emulator::Site::here()) {
  return emulated_atomic(p, [v](T old) { return static_cast<T>(old + v); }, site);
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v, emulator::Site site = emulator::Site::here()) {
  return emulated_atomic(p, [v](T old) { return std::max(old, v); }, site);
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v, emulator::Site site = emulator::Site::here()) {
  return emulated_atomic(p, [v](T old) { return old | v; }, site);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v, emulator::Site site = emulator::Site::here()) {
  return emulated_atomic(p, [v](T) { return v; }, site);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v,
            emulator::Site site = emulator::Site::here()) {
  return emulated_atomic(p, [=](T old) { return old == expected ? v : old; }, site);
}
