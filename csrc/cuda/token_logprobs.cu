// Log-probabilities of given tokens, and the entropy, in one pass over the logits (online softmax, Milakov & Gimelshein
// 2018, arXiv:1805.02867).
//
//   with       d_j = (l_j − row_max) / temperature
//   forward    logprob = d_t − log row_sum,   row_sum = Σ exp(d_j),
//              entropy = log row_sum − Σ exp(d_j) · d_j / row_sum
//   backward   dl_j = ([j = t] · g − p_j · (g + h · (d_j − log row_sum + entropy))) / temperature,
//              p_j = exp(d_j − log row_sum),   g and h the gradients of logprob and entropy
//
// Forward: a block takes a row of the logits (n_rows, vocab). Each thread keeps a maximum and sums of what it has seen;
// the block joins them at the end. Backward: a block takes a piece of a row. Both move 16 bytes a thread where the row
// is aligned. A target outside of the vocabulary makes its row NaN: to raise, as the CPU kernel does, the host would
// have to wait.
//
//               bytes a logit, fp32 (16 bits)                  FLOPs a logit
//   forward     4 (2)                                          10
//   backward    8 (4)                                          10
//
// Nothing else has n_rows · vocab elements. 2.5 to 5 FLOPs a byte: the roof is memory bandwidth.
#include "finetune/token_logprobs.h"

#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 256;
constexpr int64_t kPiece = 4096;             // elements a block, backward
constexpr float kLowest = -3.402823466e38f;  // of a finite float: where a maximum starts, for −inf − −inf is NaN
constexpr float kLeast = -200.0f;            // exp is 0 long before; keeps exp(d) · d of an infinite d at 0

// Not fmaxf alone, which drops a NaN.
__device__ __forceinline__ float distance(float logit, float row_max, float inverse) {
  const float d = (logit - row_max) * inverse;
  return d < kLeast ? kLeast : d;
}

struct RowSums {
  float row_max = kLowest, row_sum = 0, dot = 0;  // max l, Σ exp(d), Σ exp(d) · d

  // Moves to a maximum that is not smaller: every d falls by (new_max − row_max) / temperature.
  __device__ void raise(float new_max, float inverse) {
    if (row_sum == 0 || new_max == row_max) {
      row_max = new_max;
      return;
    }
    const float shift = distance(row_max, new_max, inverse), rescale = __expf(shift);
    dot = rescale * (dot + shift * row_sum);
    row_sum *= rescale;
    row_max = new_max;
  }
};

// The largest of the block's values, for every thread.
__device__ __forceinline__ float block_max(float v) {
  SHARED(float, warp_maxima, [BLOCK_SIZE / 32]);
  v = warp_max(v);
  if (threadIdx.x % 32 == 0) warp_maxima[threadIdx.x / 32] = v;
  __syncthreads();
  for (int w = 0; w < BLOCK_SIZE / 32; ++w) v = fmaxf(v, warp_maxima[w]);
  return v;
}

template <class T, bool kEntropy>
__global__ void __launch_bounds__(BLOCK_SIZE) forward(TokenLogprobs a) {
  const int64_t row = blockIdx.x, target = a.targets[row];
  if (target == a.ignore_index) {
    if (threadIdx.x == 0) {
      a.logprobs[row] = a.stats[row] = a.stats[a.rows + row] = 0;
      if (kEntropy) a.entropy[row] = 0;
    }
    return;
  }
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  RowSums mine;
  for_each_group<kVector<T>>(a.vocab, are_aligned(logits), [&]<int N>(int64_t i) {
    const auto v = load<T, N>(logits + i);
    float new_max = mine.row_max;
#pragma unroll
    for (int j = 0; j < N; ++j) new_max = fmaxf(new_max, to_float(v.at[j]));
    mine.raise(new_max, a.inverse);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float d = distance(to_float(v.at[j]), new_max, a.inverse), e = __expf(d);
      mine.row_sum += e;
      if (kEntropy) mine.dot += e * d;
    }
  });
  const float row_max = block_max(mine.row_max);
  mine.raise(row_max, a.inverse);
  const float row_sum = block_sum(mine.row_sum), dot = kEntropy ? block_sum(mine.dot) : 0, log_sum = logf(row_sum);
  if (threadIdx.x == 0) {
    const bool known = target >= 0 && target < a.vocab;
    a.logprobs[row] = known ? (to_float(logits[target]) - row_max) * a.inverse - log_sum : NAN;
    if (kEntropy) a.entropy[row] = known ? log_sum - dot / row_sum : NAN;
    a.stats[row] = row_max;
    a.stats[a.rows + row] = known ? log_sum : NAN;
  }
}

template <class T, bool kEntropy>
__global__ void __launch_bounds__(BLOCK_SIZE) backward(TokenLogprobsBackward a) {
  const int64_t pieces = ceil_div(a.vocab, kPiece), row = blockIdx.x / pieces, first = blockIdx.x % pieces * kPiece;
  const int64_t count = a.vocab - first < kPiece ? a.vocab - first : kPiece;
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride + first;
  T* out = static_cast<T*>(a.dlogits) + row * a.vocab + first;
  const bool ignored = a.targets[row] == a.ignore_index;
  const float row_max = a.stats[row], log_sum = a.stats[a.rows + row];
  const float by = a.inverse, g = a.dlogprobs ? a.dlogprobs[row] * by : 0;
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
      const float logp = distance(to_float(v.at[j]), row_max, a.inverse) - log_sum, p = __expf(logp);
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
    return launch(a.entropy ? forward<T, true> : forward<T, false>, grid, dim3(BLOCK_SIZE), 0, stream, a);
  });
}

template <>
Status launch_cuda(const TokenLogprobsBackward& a, void* stream) {
  if (!a.rows || !a.vocab) return Status::ok;
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    const dim3 grid(static_cast<unsigned>(a.rows * ceil_div(a.vocab, kPiece)));
    return launch(a.dentropy ? backward<T, true> : backward<T, false>, grid, dim3(BLOCK_SIZE), 0, stream, a);
  });
}

}  // namespace finetune
