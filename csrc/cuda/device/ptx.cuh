// The only inline PTX. Each wrapper has a device body (asm) and a host body (the emulator's,
// csrc/emulator/tensor_core.h), after the PTX ISA manual's fragment tables; tests/kernels/test_ptx.py holds both layouts
// against those tables.
#pragma once

#include "cuda.cuh"

#if !defined(__CUDACC__)
#include "tensor_core.h"
#endif

namespace finetune::ptx {

#if defined(__CUDACC__)
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
#endif

// 2^x; the hardware's approximation, 2 units in the last place. What would be subnormal is 0.
__device__ __forceinline__ float exp2(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulator::flush(std::exp2(emulator::flush(x)));
#endif
}

// 16 bytes to shared memory, at a multiple of 16.
__device__ __forceinline__ void store_shared16(void* shared, const uint4& v CALL_SITE) {
#if defined(__CUDACC__)
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
#else
  emulator::store_shared(static_cast<uint4*>(shared), v, site);
#endif
}

// bar.sync: a barrier of kThreads of the block's threads, whole warps. Barrier 0 is __syncthreads'.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_barrier(CALL_SITE_ONLY) {
  static_assert(kBarrier > 0 && kBarrier < 16 && kThreads > 0 && kThreads % 32 == 0);
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
#else
  emulator::named_barrier(kBarrier, kThreads, site);
#endif
}

// --- arithmetic within registers of several elements

// The four bytes of a and b, which are numbered from a's lowest on, that the halves of `selector`'s bytes name: bit 3 of
// a half fills its byte with the sign of the one named.
__device__ __forceinline__ unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
#if defined(__CUDACC__)
  unsigned r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
#else
  return emulator::permute_bytes(a, b, selector);
#endif
}

// (a & mask) | bits, as one instruction: nvcc makes two of it where both are constants.
__device__ __forceinline__ unsigned mask_or(unsigned a, unsigned mask, unsigned bits) {
#if defined(__CUDACC__)
  unsigned r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
  return r;
#else
  return (a & mask) | bits;
#endif
}

// a - b of two 16-bit elements, each rounded once.
template <class T>
__device__ __forceinline__ unsigned subtract(unsigned a, unsigned b) {
#if defined(__CUDACC__)
  unsigned r;
  if constexpr (std::is_same_v<T, bf16>) {  // sub.bf16x2 came with sm_90
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(b), "r"(0xbf80bf80u), "r"(a));
  } else {
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  }
  return r;
#else
  return emulator::subtract<T>(a, b);
#endif
}

// --- asynchronous copies (sm_80): 16 bytes from global to shared memory, past the registers

// Copies 16 bytes, or fills them with zeros where `read` is false (`global` is not touched then).
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool read CALL_SITE) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(read ? 16 : 0)
               : "memory");
#else
  emulator::copy_async(shared, global, 16, read ? 16 : 0, site);
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::copy_commit();
#endif
}

// Waits until at most kLeft of this thread's committed groups are under way. A barrier must follow before other threads
// read what this one copied.
template <int kLeft>
__device__ __forceinline__ void cp_async_wait(CALL_SITE_ONLY) {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  emulator::copy_wait(kLeft, site);
#endif
}

// --- ldmatrix: four 8×8 matrices of 16-bit elements. Lane i passes the address of row i % 8 of matrix i / 8 (16 bytes,
// 16-byte aligned). Lane i receives of each matrix the elements (i / 4, 2 (i % 4)) and (i / 4, 2 (i % 4) + 1), or, with
// .trans, (2 (i % 4), i / 4) and (2 (i % 4) + 1, i / 4).

__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row CALL_SITE) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulator::ldmatrix(r, 4, row, false, site);
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row CALL_SITE) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulator::ldmatrix(r, 4, row, true, site);
#endif
}

// --- mma m16n8k16: d (16×8, fp32) += a (16×16) · b (16×8), elements of 16 bits. With g = lane / 4 and t = lane % 4:
//   a[0] rows g,     columns 2t, 2t+1         a[1] rows g + 8, columns 2t, 2t+1
//   a[2] rows g,     columns 2t + 8, 2t + 9   a[3] rows g + 8, columns 2t + 8, 2t + 9
//   b[0] rows 2t, 2t + 1, column g            b[1] rows 2t + 8, 2t + 9, column g
//   d[0], d[1] row g, columns 2t, 2t + 1      d[2], d[3] row g + 8, columns 2t, 2t + 1
// The element with the smaller index is in the lower half of a register.

template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1 CALL_SITE) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  emulator::mma_16x8x16<T>(d, a, b0, b1, site);
#endif
}

// Two floats as one register of 16-bit elements, `low` in the lower half.
template <class T>
__device__ __forceinline__ unsigned pack(float low, float high) {
#if defined(__CUDACC__)
  unsigned r;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
#else
  return from_float<T>(low).bits | static_cast<unsigned>(from_float<T>(high).bits) << 16;
#endif
}

}  // namespace finetune::ptx
