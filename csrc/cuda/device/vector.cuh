// 16-byte loads and stores over a row of any length and alignment.
#pragma once

#include "cuda.cuh"

namespace finetune {

template <class... T>
__host__ __device__ __forceinline__ bool are_aligned(const T*... p) {
  return ((reinterpret_cast<uintptr_t>(p) | ...) & 15) == 0;
}

// Calls f.operator()<N>(i) so that the elements [0, dim) are dealt out to the threads of a block, N = V of them at a
// time where `aligned` allows it and one by one elsewhere. The same thread gets the same elements at every call.
template <int V, class F>
__device__ __forceinline__ void for_each_group(int64_t dim, bool aligned, F&& f) {
  const int64_t groups = aligned ? dim / V : 0;
  for (int64_t i = threadIdx.x; i < groups; i += blockDim.x) f.template operator()<V>(i * V);
  for (int64_t i = groups * V + threadIdx.x; i < dim; i += blockDim.x) f.template operator()<1>(i);
}

// The word that a vector moves as.
template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// From any memory: nvcc takes the narrowest instruction that it can prove to be right.
template <class T, int N>
__device__ __forceinline__ Vector<T, N> load(const T* p) {
  using W = typename Word<sizeof(Vector<T, N>)>::type;
  const W word = *reinterpret_cast<const W*>(p);
  return reinterpret_cast<const Vector<T, N>&>(word);
}
// To global memory (st.global: a shared address is an error; ptx::store_shared16 is for those). As one instruction:
// nvcc splits some plain copies into their elements.
template <class T, int N>
__device__ __forceinline__ void store(T* p, const Vector<T, N>& v CALL_SITE) {
  using W = typename Word<sizeof(Vector<T, N>)>::type;
  __stwb(reinterpret_cast<W*>(p), reinterpret_cast<const W&>(v) PASS_SITE);
}

}  // namespace finetune
