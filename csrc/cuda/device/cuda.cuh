// CUDA itself: nvcc's headers, or the emulator's where g++ compiles the kernels.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#else
#include "cuda.h"
#endif

// Wrappers of instructions take the place of their call as a last argument, so that the emulator names the kernel's
// line.
#if defined(__CUDACC__)
#define CALL_SITE
#define CALL_SITE_ONLY
#define PASS_SITE
#else
#define CALL_SITE , emulator::Site site = emulator::Site::here()
#define CALL_SITE_ONLY emulator::Site site = emulator::Site::here()
#define PASS_SITE , site
#endif

namespace finetune {

using bf16 = __nv_bfloat16;
using f16 = __half;
using fp8 = __nv_fp8_e4m3;
using e5m2 = __nv_fp8_e5m2;
using bf16x2 = __nv_bfloat162;
using f16x2 = __half2;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- one spelling for the element types

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }
__device__ __forceinline__ float to_float(fp8 v) { return static_cast<float>(v); }
__device__ __forceinline__ float to_float(e5m2 v) { return static_cast<float>(v); }
__device__ __forceinline__ float to_float(int8_t v) { return static_cast<float>(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return __float2bfloat16(v);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
  return __float2half(v);
}
template <>
__device__ __forceinline__ fp8 from_float<fp8>(float v) {  // what is too large becomes ±448
  fp8 out;
  out.__x = __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
  return out;
}
template <>
__device__ __forceinline__ e5m2 from_float<e5m2>(float v) {  // what is too large becomes infinite
  e5m2 out;
  out.__x = __nv_cvt_float_to_fp8(v, __NV_NOSAT, __NV_E5M2);
  return out;
}

// N elements that move as one load or store: 16 bytes at most. The address must be a multiple of N · sizeof(T).
template <class T, int N>
struct __align__(N * sizeof(T)) Vector {
  T at[N];
};
template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of the widest load

}  // namespace finetune
