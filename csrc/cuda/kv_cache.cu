// The paged key–value cache (Kwon et al. 2023, arXiv:2309.06180): append, gather, copy of blocks.
//
// append: a warp takes a head of a token: the largest magnitude by shuffles, then the rounded quotients; its second
// look at the token is served by L1. Maxima are taken of the bits of |x| as integers, where NaN is above everything, so
// that a token that is not finite gets a scale that is not. gather: a warp a head of a token of the result. copy: a
// block of threads a block of a pool.
//
// Bytes: append and gather read and write each element once, copy 2 · bytes of the blocks; 4 more a head with 8 bits.
// At most 3 FLOPs an element, below 1 FLOP a byte: the roof is memory bandwidth.
#include "device/kv_types.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int kWarps = 4;  // blocks of (32, kWarps) threads

__device__ __forceinline__ int64_t warp_index() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; }

template <class C>
__device__ __forceinline__ C quantized(float x) {
  if constexpr (std::is_same_v<C, int8_t>) {
    x = fminf(fmaxf(x, -kLargestInt8), kLargestInt8);
    return static_cast<C>(__float2int_rn(x));
  } else {
    return from_float<C>(x);
  }
}

template <class T, class C>
__device__ __forceinline__ void put(const T* x, C* y, float* scale, int64_t dim) {
  constexpr int V = kVector<T>;
  const bool aligned = are_aligned(x) && is_aligned(y, V * sizeof(C));
  if constexpr (std::is_same_v<T, C>) {
    for_each_group<V>(dim, aligned, [&]<int N>(int64_t i) { store(y + i, load<T, N>(x + i)); });
  } else {
    unsigned top = 0;
    for_each_group<V>(dim, aligned, [&]<int N>(int64_t i) {
      const auto v = load<T, N>(x + i);
#pragma unroll
      for (int j = 0; j < N; ++j) top = max(top, __float_as_uint(to_float(v.at[j])) & 0x7fffffffu);
    });
#pragma unroll
    for (int bits = 16; bits; bits /= 2) {
      top = max(top, __shfl_xor_sync(0xffffffffu, top, bits));
    }
    const float s = __uint_as_float(top) / (std::is_same_v<C, int8_t> ? kLargestInt8 : kLargestFp8);
    const bool usable = s > 0 && s <= 3.4028235e38f;
    if (threadIdx.x == 0) *scale = s;
    for_each_group<V>(dim, aligned, [&]<int N>(int64_t i) {
      const auto v = load<T, N>(x + i);
      Vector<C, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) out.at[j] = quantized<C>(usable ? to_float(v.at[j]) / s : 0.0f);
      store(y + i, out);
    });
  }
}

template <class T, class C>
__global__ void __launch_bounds__(32 * kWarps, 1) append(KvAppend a) {
  const int64_t token = warp_index() / a.kv_heads, head = warp_index() % a.kv_heads;
  if (token >= a.tokens) return;
  const int64_t slot = a.slots[token];
  if (slot < 0 || slot >= a.blocks * a.block_size) return;
  const int64_t block = slot / a.block_size, at = slot % a.block_size * a.kv_heads + head;
  const auto scale_of = [&](const KvPool& to) -> float* {
    return to.scale ? to.scale + block * to.scale_block + at : nullptr;
  };
  put(static_cast<const T*>(a.k) + token * a.k_token + head * a.k_head,
      static_cast<C*>(a.to_k.data) + block * a.to_k.block + at * a.dim, scale_of(a.to_k), a.dim);
  put(static_cast<const T*>(a.v) + token * a.v_token + head * a.v_head,
      static_cast<C*>(a.to_v.data) + block * a.to_v.block + at * a.dim, scale_of(a.to_v), a.dim);
}

template <class T, class C>
__global__ void __launch_bounds__(32 * kWarps) gather(KvGather a) {
  constexpr int V = kVector<T>;
  const int64_t length = a.width * a.block_size, row = warp_index() / a.kv_heads, head = warp_index() % a.kv_heads;
  const int64_t b = row / length, j = row % length;
  if (b >= a.batch) return;
  T* to = static_cast<T*>(a.out) + (row * a.kv_heads + head) * a.dim;
  if (j >= a.lengths[b]) {
    for_each_group<V>(a.dim, are_aligned(to), [&]<int N>(int64_t i) {
      Vector<T, N> zero;
#pragma unroll
      for (int k = 0; k < N; ++k) zero.at[k] = from_float<T>(0.0f);
      store(to + i, zero);
    });
    return;
  }
  const int64_t block = a.table[b * a.width + j / a.block_size], at = j % a.block_size * a.kv_heads + head;
  const C* from = static_cast<const C*>(a.from.data) + block * a.from.block + at * a.dim;
  const bool aligned = are_aligned(to) && is_aligned(from, V * sizeof(C));
  if constexpr (std::is_same_v<T, C>) {
    for_each_group<V>(a.dim, aligned, [&]<int N>(int64_t i) { store(to + i, load<T, N>(from + i)); });
  } else {
    const float s = a.from.scale[block * a.from.scale_block + at];
    for_each_group<V>(a.dim, aligned, [&]<int N>(int64_t i) {
      const auto v = load<C, N>(from + i);
      Vector<T, N> out;
#pragma unroll
      for (int k = 0; k < N; ++k) out.at[k] = from_float<T>(to_float(v.at[k]) * s);
      store(to + i, out);
    });
  }
}

__global__ void __launch_bounds__(128) copy(KvCopy a) {
  const int pool = static_cast<int>(blockIdx.x % a.pools);
  const int64_t* pair = a.pairs + blockIdx.x / a.pools * 2;
  const char* from = a.data[pool] + pair[0] * a.stride[pool];
  char* to = a.data[pool] + pair[1] * a.stride[pool];
  for_each_group<16>(a.bytes[pool], are_aligned(from, to),
                     [&]<int N>(int64_t i) { store(to + i, load<char, N>(from + i)); });
}

dim3 grid_of(int64_t warps) { return dim3(static_cast<unsigned>(ceil_div(warps, kWarps))); }

}  // namespace

template <>
Status launch_cuda(const KvAppend& a, void* stream) {
  return for_types(a.dtype, a.stored, [&](auto t, auto c) {
    return launch(append<decltype(t), decltype(c)>, grid_of(a.tokens * a.kv_heads), dim3(32, kWarps), 0, stream, a);
  });
}

template <>
Status launch_cuda(const KvGather& a, void* stream) {
  return for_types(a.dtype, a.stored, [&](auto t, auto c) {
    const int64_t warps = a.batch * a.width * a.block_size * a.kv_heads;
    return launch(gather<decltype(t), decltype(c)>, grid_of(warps), dim3(32, kWarps), 0, stream, a);
  });
}

template <>
Status launch_cuda(const KvCopy& a, void* stream) {
  return launch(copy, dim3(static_cast<unsigned>(a.count * a.pools)), dim3(128), 0, stream, a);
}

}  // namespace finetune
