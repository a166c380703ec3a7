// The only <<<>>>; shared memory; sums over a warp and a block. Under nvcc and under the emulator alike.
#pragma once

#include "cuda.cuh"
#include "finetune/kernel.h"

// SHARED(float, rows, [4][33]): a block's array, `float (&rows)[4][33]`.  DYN_SHARED(float, p): a pointer to the
// dynamic shared memory of the launch, aligned to 1024 bytes.
#if defined(__CUDACC__)
#define SHARED(T, name, dims) __shared__ T name dims
#define DYN_SHARED(T, name)                                                \
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared_memory)
#else
#define SHARED(T, name, dims)      \
  T(&name)                         \
  dims = emulator::shared<T dims>( \
      []() -> const void* {        \
        static const char key = 0; \
        return &key;               \
      }(),                         \
      #name)
#define DYN_SHARED(T, name) T* const name = static_cast<T*>(emulator::dynamic_shared())
#endif

namespace finetune {

// Queues kernel<<<grid, block, shared, stream>>>(args…), with as much dynamic shared memory as asked for.
template <class... P, class... A>
Status launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, [[maybe_unused]] void* stream, A... args) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "kernel parameters");
#if defined(__CUDACC__)
  const auto status = [](cudaError_t error) {
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) return Status::no_kernel;
    if (error == cudaSuccess) return Status::ok;
    failure = {cudaGetErrorString(error), 0, 0};
    cudaDriverGetVersion(&failure.driver);
    cudaRuntimeGetVersion(&failure.runtime);
    return Status::failed;
  };
  if (shared > 48 * 1024) {
    const Status allowed =
        status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    if (allowed != Status::ok) {
      cudaGetLastError();  // the next launch must not find this one's error
      return allowed;
    }
  }
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(args)...);
  return status(cudaGetLastError());
#else
  auto body = [kernel, ... given = static_cast<P>(args)] { kernel(given...); };
  const bool ok = emulator::run_grid(
      reinterpret_cast<const void*>(kernel), grid, block, shared, [](void* f) { (*static_cast<decltype(body)*>(f))(); },
      &body, sizeof body);
  return ok ? Status::ok : Status::failed;
#endif
}

constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};

// Calls f with a value of the element type that `dtype` names: for_dtype(a.dtype, [&](auto t) { using T = decltype(t);
// … }).
template <class F>
Status for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    case DType::f64:
      break;
  }
  return Status::unsupported;
}

// --- sums and maxima over a warp and a block

template <class F>
__device__ __forceinline__ float warp_reduce(float v, F&& join) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) v = join(v, __shfl_xor_sync(0xffffffffu, v, bits));
  return v;
}
__device__ __forceinline__ float warp_sum(float v) {
  return warp_reduce(v, [](float a, float b) { return a + b; });
}
__device__ __forceinline__ float warp_max(float v) {
  return warp_reduce(v, [](float a, float b) { return fmaxf(a, b); });
}

// Every thread of a block of whole warps gets the sum. Leaves its buffer free for the next call.
__device__ __forceinline__ float block_sum(float v) {
  SHARED(float, sums, [32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  v = warp_sum(v);
  if (lane == 0) sums[warp] = v;
  __syncthreads();
  v = warp_sum(lane < warps ? sums[lane] : 0.0f);
  __syncthreads();
  return v;
}

}  // namespace finetune
