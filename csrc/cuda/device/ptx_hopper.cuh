// sm_90: mbarriers, the Tensor Memory Accelerator (TMA), wgmma. Like ptx.cuh: each wrapper has a device body and the
// emulator's (csrc/emulator/hopper.h), after the PTX ISA manual; tests/kernels/test_hopper.py holds both layouts against it.
#pragma once

#include "ptx.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
#else
#include "hopper.h"
#endif

namespace finetune::ptx {

// --- mbarriers: 8 bytes of shared memory that count arrivals and landed bytes, phase after phase. wait(bar, parity)
// returns once the phase of that parity is complete; the first phase has parity 0, so that a wait for parity 1 on a
// fresh barrier returns at once.

using Mbarrier = uint64_t;

__device__ __forceinline__ void mbarrier_init(Mbarrier* bar, unsigned count CALL_SITE) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
#else
  emulator::mbarrier_init(bar, count, site);
#endif
}

// By the thread that has initialized them, before a barrier of the block: copies see them too.
__device__ __forceinline__ void mbarrier_init_fence() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emulator::mbarrier_init_fence();
#endif
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* bar CALL_SITE) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
#else
  emulator::mbarrier_arrive(bar, 0, site);
#endif
}

// Arrives, and lets the phase wait for `bytes` more bytes.
__device__ __forceinline__ void mbarrier_expect(Mbarrier* bar, unsigned bytes CALL_SITE) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
#else
  emulator::mbarrier_arrive(bar, bytes, site);
#endif
}

__device__ __forceinline__ void mbarrier_wait(Mbarrier* bar, unsigned parity CALL_SITE) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
#else
  emulator::mbarrier_wait(bar, parity, site);
#endif
}

// What this thread has written to shared memory, and what it knows others to have written, is seen by copies and
// products that begin after it (and after a barrier, where others begin them).
__device__ __forceinline__ void async_proxy_fence(CALL_SITE_ONLY) {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emulator::async_proxy_fence(site);
#endif
}

// --- copies by TMA, issued by one thread; their bytes are counted at `bar`

// 16-byte aligned addresses, a multiple of 16 bytes.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, unsigned bytes, Mbarrier* bar CALL_SITE) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(bar))
               : "memory");
#else
  emulator::bulk_copy(shared, global, bytes, bar, site);
#endif
}

#if defined(__CUDACC__)
using TensorMap = CUtensorMap;
#else
using TensorMap = emulator::TensorMap;
#endif

// The box of `map` from element (x, y, z, w) on, as rows of 128 bytes one after another; chunk c (16 bytes) of row r is
// at place c ^ r % 8 of its row (the 128-byte swizzle). What is outside the tensor becomes zeros. `shared`: 1024-byte
// aligned.
__device__ __forceinline__ void tensor_copy(void* shared, const TensorMap* map, int x, int y, int z, int w,
                                            Mbarrier* bar CALL_SITE) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(bar))
      : "memory");
#else
  emulator::tensor_copy(shared, *map, {x, y, z, w}, bar, site);
#endif
}

// For the host: the map of a 4-dimensional tensor of 16-bit elements. size: elements; stride: elements, multiples of 8
// but for the first, which is 1; box: {64, 1, rows, 1} elements and so on. False: the driver refuses.
template <class T>
bool make_tensor_map(TensorMap& map, const void* data, const int64_t (&size)[4], const int64_t (&stride)[4],
                     const int (&box)[4]) {
#if defined(__CUDACC__)
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const bool ok = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                                     &result) == cudaSuccess &&
                    result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(ok ? found : nullptr);
  }();
  if (!encode) return false;
  cuuint64_t sizes[4], bytes[3];
  cuuint32_t boxes[4], steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) {
    sizes[i] = static_cast<cuuint64_t>(size[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    if (i) bytes[i - 1] = static_cast<cuuint64_t>(stride[i]) * sizeof(T);
  }
  const auto type = std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(&map, type, 4, const_cast<void*>(data), sizes, bytes, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#else
  map.data = static_cast<const char*>(data);
  bool ok = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int i = 0; i < 4; ++i) {
    map.size[i] = size[i];
    map.stride[i] = stride[i] * static_cast<int64_t>(sizeof(T));
    map.box[i] = box[i];
    ok = ok && size[i] > 0 && size[i] <= int64_t{1} << 32 && box[i] > 0 && box[i] <= 256 && stride[i] > 0;
    ok = ok && (i == 0 ? stride[0] == 1 && box[0] == 64 : map.stride[i] % 16 == 0 && map.stride[i] < int64_t{1} << 40);
  }
  return ok;
#endif
}

// --- wgmma: d (64 × N, fp32) += a (64 × 16) · b (16 × N) by the four warps of a warpgroup, asynchronously. With warp
// w, g = lane / 4 and t = lane % 4: d[4 j], d[4 j + 1] are row 16 w + g, columns 8 j + 2 t and + 1; d[4 j + 2], d[4 j +
// 3] row 16 w + g + 8. a in registers: as for mma_16x8x16, of rows 16 w …. Matrices in shared memory are described by
// matrix(): as tensor_copy leaves them, 64 elements (128 bytes) a row.
//   fence(d), products, commit(), wait<0>(d): between commit and wait nothing may touch d, nor anybody the matrices.
// Registers of a are written before the fence too, and not until the wait: fence(d, a), wait<0>(d, a).

// stride: bytes from 8 rows to the next 8; leading: from 64 columns to the next 64, where b is transposed (rows along
// k).
__device__ __forceinline__ uint64_t matrix(const void* shared, unsigned stride, unsigned leading = 16 CALL_SITE) {
#if defined(__CUDACC__)
  const unsigned address = shared_address(shared);
#else
  const unsigned address = emulator::matrix_address(shared, stride, leading, site);
#endif
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

// The compiler must not move what it does with these registers across this.
template <int N>
__device__ __forceinline__ void keep([[maybe_unused]] float (&d)[N]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}
template <int M>
__device__ __forceinline__ void keep([[maybe_unused]] unsigned (&a)[M][4]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < 4 * M; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
#endif
}

template <int N>
__device__ __forceinline__ void wgmma_fence(float (&d)[N] CALL_SITE) {
  keep(d);
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_fence({{d, sizeof d}}, site);
#endif
}
template <int N, int M>
__device__ __forceinline__ void wgmma_fence(float (&d)[N], unsigned (&a)[M][4] CALL_SITE) {
  keep(a);
  keep(d);
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_fence({{d, sizeof d}, {a, sizeof a}}, site);
#endif
}

__device__ __forceinline__ void wgmma_commit(CALL_SITE_ONLY) {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_commit(site);
#endif
}

template <int kLeft, int N>
__device__ __forceinline__ void wgmma_wait([[maybe_unused]] float (&d)[N] CALL_SITE) {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#else
  emulator::wgmma_wait(kLeft, site);
#endif
  keep(d);
}
template <int kLeft, int N, int M>
__device__ __forceinline__ void wgmma_wait(float (&d)[N], unsigned (&a)[M][4] CALL_SITE) {
  wgmma_wait<kLeft>(d PASS_SITE);
  keep(a);
}

#if !defined(__CUDACC__)
template <class T>
float widen(uint16_t bits) {
  return to_float(T{bits});
}
#endif

#define D8(i)                                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
#define NAMES_64                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_MATRIX_64(type)                                                                                    \
  asm volatile(                                                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                               \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" NAMES_64 "}, %32, %33, p, 1, 1, 0, 0;\n}" \
      : D32(0)                                                                                                   \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define WGMMA_REGISTERS_64(type)                                                \
  asm volatile(                                                                 \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                              \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" NAMES_64 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"                            \
      : D32(0)                                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))
#define NAMES_128                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_MATRIX_128(type)                                                                                     \
  asm volatile(                                                                                                    \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                                 \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" NAMES_128 "}, %64, %65, p, 1, 1, 0, 0;\n}" \
      : D32(0), D32(32)                                                                                            \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define WGMMA_REGISTERS_128(type)                                                 \
  asm volatile(                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" NAMES_128 \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"                              \
      : D32(0), D32(32)                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))

// a and b in shared memory, both with their rows along k: d = a bᵀ of row-major matrices.
template <class T, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate CALL_SITE) {
  static_assert(N == 64 || N == 128);
#if defined(__CUDACC__)
  if constexpr (N == 64) {
    if constexpr (std::is_same_v<T, bf16>) {
      WGMMA_MATRIX_64("bf16");
    } else {
      WGMMA_MATRIX_64("f16");
    }
  } else {
    if constexpr (std::is_same_v<T, bf16>) {
      WGMMA_MATRIX_128("bf16");
    } else {
      WGMMA_MATRIX_128("f16");
    }
  }
#else
  emulator::wgmma({d, N, nullptr, a, b, false, accumulate, widen<T>}, site);
#endif
}

// a in registers, b in shared memory with its rows along n: d = a b of row-major matrices.
template <class T, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const unsigned (&a)[4], uint64_t b,
                                      bool accumulate CALL_SITE) {
  static_assert(N == 64 || N == 128);
#if defined(__CUDACC__)
  if constexpr (N == 64) {
    if constexpr (std::is_same_v<T, bf16>) {
      WGMMA_REGISTERS_64("bf16");
    } else {
      WGMMA_REGISTERS_64("f16");
    }
  } else {
    if constexpr (std::is_same_v<T, bf16>) {
      WGMMA_REGISTERS_128("bf16");
    } else {
      WGMMA_REGISTERS_128("f16");
    }
  }
#else
  emulator::wgmma({d, N, a, 0, b, true, accumulate, widen<T>}, site);
#endif
}

#undef D8
#undef D32
#undef NAMES_64
#undef NAMES_128
#undef WGMMA_MATRIX_64
#undef WGMMA_MATRIX_128
#undef WGMMA_REGISTERS_64
#undef WGMMA_REGISTERS_128

// The warpgroup gives registers back, or takes more: kRegisters a thread from now on.
template <int kRegisters>
__device__ __forceinline__ void fewer_registers(CALL_SITE_ONLY) {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulator::set_registers(kRegisters, false, site);
#endif
}
template <int kRegisters>
__device__ __forceinline__ void more_registers(CALL_SITE_ONLY) {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulator::set_registers(kRegisters, true, site);
#endif
}

}  // namespace finetune::ptx
