// GroupNorm (Wu & He 2018, arXiv:1803.08494) and SiLU.
//
//   forward    y = z · s,   z = x̂ · w + b,   s = 1 / (1 + exp(−z)),   x̂ = (x − mean) · rstd
//   backward   d = dy · s · (1 + z · (1 − s));   db = Σ d,   dw = Σ d · x̂ over positions, then over images
//              dx = rstd · (d · w − Σ w · db / n − x̂ · Σ w · dw / n), sums over the n elements' channels
//
// Forward: a block takes a group of an image, which is contiguous; the second and the third pass are served by L1 or
// L2. Backward: a block takes a channel of an image for its two sums, then a block a group for dx, whose means follow
// from the channels' sums; a last kernel adds these over images, in a fixed order.
//
//               elements from and to memory                    FLOPs an element (exp counted as five)
//   forward     2 · images · channels · positions              17
//   backward    5 · images · channels · positions              50
//
// 1 to 3 FLOPs a byte: the roof is memory bandwidth.
#include "finetune/group_norm_silu.h"

#include "norm_backward.cuh"

namespace finetune {
namespace {

// expf, not __expf, whose error grows with the argument. An IEEE division would be a call, and spill.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// The derivative of silu.
__device__ __forceinline__ float slope(float z) {
  const float s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

// i / n, in 32 bits where both fit, which is several times as fast.
__device__ __forceinline__ int64_t quotient(int64_t i, int64_t n) {
  if ((i | n) >> 32) return i / n;
  return static_cast<uint32_t>(i) / static_cast<uint32_t>(n);
}

// May a group's elements move 16 bytes at a time? All of a vector are of one channel.
template <class T, class... P>
__device__ __forceinline__ bool whole_vectors(int64_t positions, const P*... p) {
  return positions % kVector<T> == 0 && are_aligned(p...);
}

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) forward(GroupNormSilu a) {
  constexpr int V = kVector<T>;
  const int64_t unit = blockIdx.x, channels = a.channels / a.groups, n = channels * a.positions;
  const T *x = static_cast<const T*>(a.x) + unit * n, *w = static_cast<const T*>(a.weight) + unit % a.groups * channels,
          *b = static_cast<const T*>(a.bias) + unit % a.groups * channels;
  T* y = static_cast<T*>(a.y) + unit * n;
  const bool aligned = whole_vectors<T>(a.positions, x, y);
  const auto count = static_cast<float>(n);
  if (n == 0) {
    if (threadIdx.x == 0) a.mean[unit] = a.rstd[unit] = 0;
    return;
  }
  float sum = 0, squares = 0;
  for_each_group<V>(n, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += to_float(v.at[j]);
  });
  const float mean = block_sum(sum) / count;
  for_each_group<V>(n, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) squares += (to_float(v.at[j]) - mean) * (to_float(v.at[j]) - mean);
  });
  const float variance = block_sum(squares) / count;
  const float rstd = rsqrtf(variance + a.eps);
  if (threadIdx.x == 0) a.mean[unit] = mean, a.rstd[unit] = rstd;
  for_each_group<V>(n, aligned, [&]<int N>(int64_t i) {
    const int64_t c = quotient(i, a.positions);
    const float scale = to_float(w[c]), shift = to_float(b[c]);
    const auto v = load<T, N>(x + i);
    Vector<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float z = (to_float(v.at[j]) - mean) * rstd * scale + shift;
      out.at[j] = from_float<T>(z * sigmoid(z));
    }
    store(y + i, out);
  });
}

// partial (2, images, channels): Σ d · x̂ and Σ d over the positions of this block's channel.
template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) channel_sums(GroupNormSiluBackward a) {
  const int64_t at = blockIdx.x, c = at % a.channels, unit = at / (a.channels / a.groups);
  const T *x = static_cast<const T*>(a.x) + at * a.positions, *dy = static_cast<const T*>(a.dy) + at * a.positions;
  const float mean = a.mean[unit], rstd = a.rstd[unit];
  const float scale = to_float(static_cast<const T*>(a.weight)[c]), shift = to_float(static_cast<const T*>(a.bias)[c]);
  float dw = 0, db = 0;
  for_each_group<kVector<T>>(a.positions, are_aligned(x, dy), [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i), g = load<T, N>(dy + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float normal = (to_float(v.at[j]) - mean) * rstd;
      const float d = to_float(g.at[j]) * slope(normal * scale + shift);
      dw += d * normal;
      db += d;
    }
  });
  dw = block_sum(dw);
  db = block_sum(db);
  if (threadIdx.x == 0) a.partial[at] = dw, a.partial[a.images * a.channels + at] = db;
}

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) backward(GroupNormSiluBackward a) {
  const int64_t unit = blockIdx.x, channels = a.channels / a.groups, n = channels * a.positions;
  const T *x = static_cast<const T*>(a.x) + unit * n, *dy = static_cast<const T*>(a.dy) + unit * n,
          *w = static_cast<const T*>(a.weight) + unit % a.groups * channels,
          *b = static_cast<const T*>(a.bias) + unit % a.groups * channels;
  T* dx = static_cast<T*>(a.dx) + unit * n;
  const float *dw = a.partial + unit * channels, *db = dw + a.images * a.channels;
  const float mean = a.mean[unit], rstd = a.rstd[unit], count = static_cast<float>(n);
  float push = 0, pull = 0;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    push += to_float(w[c]) * db[c];
    pull += to_float(w[c]) * dw[c];
  }
  push = block_sum(push) / count;
  pull = block_sum(pull) / count;
  for_each_group<kVector<T>>(n, whole_vectors<T>(a.positions, x, dy, dx), [&]<int N>(int64_t i) {
    const int64_t c = quotient(i, a.positions);
    const float scale = to_float(w[c]), shift = to_float(b[c]);
    const auto v = load<T, N>(x + i), g = load<T, N>(dy + i);
    Vector<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float normal = (to_float(v.at[j]) - mean) * rstd;
      const float d = to_float(g.at[j]) * slope(normal * scale + shift);
      out.at[j] = from_float<T>((d * scale - push - normal * pull) * rstd);
    }
    store(dx + i, out);
  });
}

}  // namespace

template <>
Status launch_cuda(const GroupNormSilu& a, void* stream) {
  if (!a.images || !a.channels) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    const dim3 grid(static_cast<unsigned>(a.images * a.groups));
    return launch(forward<decltype(t)>, grid, dim3(BLOCK_SIZE), 0, stream, a);
  });
}

template <>
Status launch_cuda(const GroupNormSiluBackward& a, void* stream) {
  const int64_t all = a.images * a.channels;
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    Status status = Status::ok;
    if (all) {
      const unsigned threads = a.positions < BLOCK_SIZE * kVector<T> ? 32 : BLOCK_SIZE;
      status = launch(channel_sums<T>, dim3(static_cast<unsigned>(all)), dim3(threads), 0, stream, a);
      if (status != Status::ok) return status;
      status = launch(backward<T>, dim3(static_cast<unsigned>(a.images * a.groups)), dim3(BLOCK_SIZE), 0, stream, a);
    }
    if (status == Status::ok) status = launch_join<T>(a.partial, a.images, a.channels, a.dweight, stream);
    if (status != Status::ok) return status;
    return launch_join<T>(a.partial + all, a.images, a.channels, a.dbias, stream);
  });
}

}  // namespace finetune
