// log_softmax and gather, and the entropy, in one pass over the logits (online softmax, Milakov & Gimelshein 2018,
// arXiv:1805.02867). With m the row's maximum and d_j = (l_j − m) / temperature:
//   S = Σ exp(d_j),   logprob = d_t − log S,   entropy = log S − Σ exp(d_j) · d_j / S.
// Backward, with p_j = exp(d_j − log S):   dl_j = ([j = t] · g − p_j · (g + h · (d_j − log S + entropy))) /
// temperature.
//
// Forward: a block takes a row, 16 bytes a thread and load where it is aligned; every thread keeps a maximum and sums
// of its own, which the block joins at the end. Backward: a block takes a piece of a row. Memory: the logits are read
// once, then read and written: 2 and 4 bytes a logit in 16 bits, 4 and 8 in fp32, nothing else of size rows · vocab.
// About 10 FLOPs a logit each way, 2.5 to 5 FLOPs a byte: the roof is memory bandwidth. A target outside of the
// vocabulary makes its row NaN: to raise, as the CPU kernel does, the host would have to wait.
// Faults: block_sum.no_barrier block_sum.no_second_barrier token_logprobs.no_barrier token_logprobs.no_tail
//         token_logprobs.no_rescale token_logprobs.no_shift token_logprobs.temperature token_logprobs.ignored
#include "finetune/token_logprobs.h"
#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPiece = 4096;             // elements a block, backward
constexpr float kLowest = -3.402823466e38f;  // of a finite float: where a maximum starts, for −inf − −inf is NaN
constexpr float kLeast = -200.0f;            // exp is 0 long before; keeps exp(d) · d of an infinite d at 0

// Not fmaxf alone, which drops a NaN.
__device__ __forceinline__ float distance(float logit, float top, float inverse) {
  const float d = (logit - top) * inverse;
  return d < kLeast ? kLeast : d;
}

struct RowSums {
  float top = kLowest, sum = 0, dot = 0;  // max l, Σ exp(d), Σ exp(d) · d

  // Moves to a maximum that is not smaller: every d falls by (now − top) / temperature.
  __device__ void raise(float now, float inverse) {
    if (sum == 0 || now == top) {
      top = now;
      return;
    }
    const float shift = distance(top, now, inverse), scale = BUG("token_logprobs.no_rescale") ? 1.0f : __expf(shift);
    dot = scale * (dot + (BUG("token_logprobs.no_shift") ? 0 : shift * sum));
    sum *= scale;
    top = now;
  }
};

// The largest of the block's values, for every thread.
__device__ __forceinline__ float block_max(float v) {
  SHARED(float, tops, [kThreads / 32]);
  v = warp_max(v);
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = v;
  if (!BUG("token_logprobs.no_barrier")) __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) v = fmaxf(v, tops[w]);
  return v;
}

template <class T, bool kEntropy>
__global__ void __launch_bounds__(kThreads) forward(TokenLogprobs a) {
  const int64_t row = blockIdx.x, target = a.targets[row];
  if (target == a.ignore_index) {
    if (threadIdx.x == 0) {
      a.logprobs[row] = a.stats[row] = a.stats[a.rows + row] = 0;
      if (kEntropy) a.entropy[row] = 0;
    }
    return;
  }
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  const int64_t vocab = BUG("token_logprobs.no_tail") ? a.vocab / kVector<T> * kVector<T> : a.vocab;
  RowSums mine;
  for_each_group<kVector<T>>(vocab, are_aligned(logits), [&]<int N>(int64_t i) {
    const auto v = load<T, N>(logits + i);
    float top = mine.top;
#pragma unroll
    for (int j = 0; j < N; ++j) top = fmaxf(top, to_float(v.at[j]));
    mine.raise(top, a.inverse);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float d = distance(to_float(v.at[j]), top, a.inverse), e = __expf(d);
      mine.sum += e;
      if (kEntropy) mine.dot += e * d;
    }
  });
  const float top = block_max(mine.top);
  mine.raise(top, a.inverse);
  const float sum = block_sum(mine.sum), dot = kEntropy ? block_sum(mine.dot) : 0, log_sum = logf(sum);
  if (threadIdx.x == 0) {
    const bool known = target >= 0 && target < a.vocab;
    a.logprobs[row] = known ? (to_float(logits[target]) - top) * a.inverse - log_sum : NAN;
    if (kEntropy) a.entropy[row] = known ? log_sum - dot / sum : NAN;
    a.stats[row] = top;
    a.stats[a.rows + row] = known ? log_sum : NAN;
  }
}

template <class T, bool kEntropy>
__global__ void __launch_bounds__(kThreads) backward(TokenLogprobsBackward a) {
  const int64_t pieces = ceil_div(a.vocab, kPiece), row = blockIdx.x / pieces, first = blockIdx.x % pieces * kPiece;
  const int64_t count = a.vocab - first < kPiece ? a.vocab - first : kPiece;
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride + first;
  T* out = static_cast<T*>(a.dlogits) + row * a.vocab + first;
  const bool ignored = a.targets[row] == a.ignore_index && !BUG("token_logprobs.ignored");
  const float top = a.stats[row], log_sum = a.stats[a.rows + row];
  const float by = BUG("token_logprobs.temperature") ? 1.0f : a.inverse, g = a.dlogprobs ? a.dlogprobs[row] * by : 0;
  const float h = kEntropy ? a.dentropy[row] * by : 0, entropy = kEntropy ? a.entropy[row] : 0;
  const int64_t target = a.targets[row] - first;
  for_each_group<kVector<T>>(count, are_aligned(logits, out), [&]<int N>(int64_t i) {
    Vector<T, N> dl;
    if (ignored) {
      for (int j = 0; j < N; ++j) dl.at[j] = from_float<T>(0);
      store(out + i, dl);
      return;
    }
    const auto v = load<T, N>(logits + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float logp = distance(to_float(v.at[j]), top, a.inverse) - log_sum, p = __expf(logp);
      const float pull = kEntropy ? p * (g + h * (logp + entropy)) : p * g;
      dl.at[j] = from_float<T>((i + j == target ? g : 0) - pull);
    }
    store(out + i, dl);
  });
}

}  // namespace

template <>
Status launch_cuda(const TokenLogprobs& a, void* stream) {
  if (!a.rows) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    const dim3 grid(static_cast<unsigned>(a.rows));
    return launch(a.entropy ? forward<T, true> : forward<T, false>, grid, dim3(kThreads), 0, stream, a);
  });
}

template <>
Status launch_cuda(const TokenLogprobsBackward& a, void* stream) {
  if (!a.rows || !a.vocab) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    const dim3 grid(static_cast<unsigned>(a.rows * ceil_div(a.vocab, kPiece)));
    return launch(a.dentropy ? backward<T, true> : backward<T, false>, grid, dim3(kThreads), 0, stream, a);
  });
}

}  // namespace finetune
