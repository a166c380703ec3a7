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

template <class T, int N>
__device__ __forceinline__ Vector<T, N> load(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
template <class T, int N>
__device__ __forceinline__ void store(T* p, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

}  // namespace finetune
