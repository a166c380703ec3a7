// Rotary position embedding (Su et al. 2021, arXiv:2104.09864), rotate-half convention.
//
//   forward    y1 = x1 · cos θ − x2 · sin θ,   y2 = x2 · cos θ + x1 · sin θ,   θ = position · frequency
//   backward   the rotation by −θ, since a rotation is orthogonal
//
// x1 and x2 are the halves of a head; cos θ and sin θ come from tables (max_length, dim / 2).
// A thread takes 16 bytes of x1 and of x2, or one element of each where heads are not aligned. Neighboring threads go
// along a head, then over the heads of a token, which share the token's row of the tables through L1.
// A position outside of the tables makes its token NaN: to raise, as the CPU kernel does, the host would have to wait.
//
// Bytes: x is read and y written once, 8 bytes an element in fp32, 4 in 16 bits. FLOPs: 3 an element, under 1 a byte:
// the roof is memory bandwidth.
#include "finetune/rope.h"

#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 128;

template <int N>
__device__ __forceinline__ void load_floats(const float* p, float (&out)[N]) {
  constexpr int V = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += V) {
    const auto v = load<float, V>(p + i);
    for (int j = 0; j < V; ++j) out[i + j] = v.at[j];
  }
}

template <class T, int N>
__global__ void __launch_bounds__(BLOCK_SIZE) rotate(Rope a) {
  const int64_t half = a.dim / 2, groups = half / N;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * BLOCK_SIZE + threadIdx.x;
  const int64_t token = at / groups / a.heads, head = at / groups % a.heads, i = at % groups * N;
  if (token >= a.batch * a.length) return;
  const int64_t b = token / a.length, t = token % a.length, position = a.positions[token];
  const T* x = static_cast<const T*>(a.x) + b * a.stride_batch + t * a.stride_length + head * a.stride_head + i;
  T* y = static_cast<T*>(a.y) + (token * a.heads + head) * a.dim + i;
  float c[N], s[N];
  if (position >= 0 && position < a.max_length) {
    load_floats(a.cos + position * half + i, c);
    load_floats(a.sin + position * half + i, s);
  } else {
    for (int j = 0; j < N; ++j) c[j] = s[j] = NAN;
  }
  const auto x1 = load<T, N>(x), x2 = load<T, N>(x + half);
  Vector<T, N> y1, y2;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float v1 = to_float(x1.at[j]), v2 = to_float(x2.at[j]);
    const float turn = a.inverse ? -s[j] : s[j];
    y1.at[j] = from_float<T>(v1 * c[j] - v2 * turn);
    y2.at[j] = from_float<T>(v2 * c[j] + v1 * turn);
  }
  store(y, y1);
  store(y + half, y2);
}

}  // namespace

template <>
Status launch_cuda(const Rope& a, void* stream) {
  const int64_t size = a.batch * a.length * a.heads * (a.dim / 2);
  if (!size) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int V = kVector<T>;
    const bool even =
        a.dim / 2 % V == 0 && a.stride_batch % V == 0 && a.stride_length % V == 0 && a.stride_head % V == 0;
    const bool wide =
        even && are_aligned(static_cast<const T*>(a.x), static_cast<const T*>(a.y)) && are_aligned(a.cos, a.sin);
    const dim3 grid(static_cast<unsigned>(ceil_div(size / (wide ? V : 1), BLOCK_SIZE)));
    return launch(wide ? rotate<T, V> : rotate<T, 1>, grid, dim3(BLOCK_SIZE), 0, stream, a);
  });
}

}  // namespace finetune
