// log_softmax and gather, and the entropy, in one pass over the logits (online softmax, Milakov & Gimelshein 2018,
// arXiv:1805.02867). With m the row's maximum and d_j = (l_j − m) / temperature:
//   S = Σ exp(d_j),   logprob = d_t − log S,   entropy = log S − Σ exp(d_j) · d_j / S.
// Backward, with p_j = exp(d_j − log S):   dl_j = ([j = t] · g − p_j · (g + h · (d_j − log S + entropy))) /
// temperature.
//
// Memory: forward reads the logits once, in blocks that stay in L1 between their maximum and their sums; backward reads
// and writes them: 4 and 8 bytes a logit in fp32, half of that in bf16. About 20 FLOPs a logit each way, exp most of
// them: bandwidth is the roof with many threads, exp with few. Arithmetic is fp32, sums of blocks join in double.
#include "finetune/token_logprobs.h"

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int64_t kBlock = 2048;
constexpr float kLowest = -3.402823466e38f;  // of a finite float: where a maximum starts, for −inf − −inf is NaN
constexpr float kLeast = -200.0f;            // exp is 0 long before; keeps exp(d) · d of an infinite d at 0

// d of a vector; NaN stays NaN.
FINETUNE_INLINE vf distance(vf logits, float top, float inverse) {
  return vmax(set1(kLeast), (logits - top) * inverse);
}

struct RowSums {
  float top = kLowest;
  double sum = 0, dot = 0;  // Σ exp(d), Σ exp(d) · d

  // Moves to a larger maximum: every d grows by (top − now) / temperature.
  void raise(float now, float inverse) {
    if (top != now && sum != 0) {
      const double shift = (static_cast<double>(top) - now) * inverse, scale = __builtin_exp(shift);
      dot = scale == 0 ? 0 : scale * (dot + shift * sum);
      sum *= scale;
    }
    top = now;
  }
};

template <bool kEntropy, class T>
FINETUNE_INLINE RowSums sums_of(const T* logits, int64_t vocab, float inverse) {
  RowSums row;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const T* block = logits + start;
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock, whole = n / kLanes * kLanes;
    vf tops[2] = {set1(row.top), set1(row.top)};
    int64_t j = 0;
    for (; j + 2 * kLanes <= whole; j += 2 * kLanes) {
      for (int k = 0; k < 2; ++k) tops[k] = vmax(load(block + j + k * kLanes), tops[k]);
    }
    for (; j < whole; j += kLanes) tops[0] = vmax(load(block + j), tops[0]);
    float top = max(vmax(tops[0], tops[1]));
    for (j = whole; j < n; ++j) top = to_float(block[j]) > top ? to_float(block[j]) : top;
    row.raise(top, inverse);
    vf sums[2]{}, dots[2]{};
    const auto add = [&](vf v, int k) {
      const vf d = distance(v, top, inverse), e = vexp(d);
      sums[k] += e;
      if (kEntropy) dots[k] += e * d;
    };
    for (j = 0; j + 2 * kLanes <= whole; j += 2 * kLanes) {
      add(load(block + j), 0);
      add(load(block + j + kLanes), 1);
    }
    for (; j < whole; j += kLanes) add(load(block + j), 0);
    row.sum += sum(sums[0] + sums[1]);
    if (kEntropy) row.dot += sum(dots[0] + dots[1]);
    if (whole < n) {
      const vf d = distance(load_part(block + whole, n - whole), top, inverse), e = vexp(d);
      for (j = 0; j < n - whole; ++j) {
        row.sum += e[j];
        row.dot += e[j] * d[j];
      }
    }
  }
  return row;
}

template <class T>
void forward(const TokenLogprobs& a) {
  parallel_for(a.rows, 1 + 16384 / (a.vocab + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* logits = static_cast<const T*>(a.logits) + i * a.stride;
      if (a.targets[i] == a.ignore_index) {
        a.logprobs[i] = a.stats[i] = a.stats[a.rows + i] = 0;
        if (a.entropy) a.entropy[i] = 0;
        continue;
      }
      const RowSums row =
          a.entropy ? sums_of<true>(logits, a.vocab, a.inverse) : sums_of<false>(logits, a.vocab, a.inverse);
      const double log_sum = __builtin_log(row.sum);
      const float d = (to_float(logits[a.targets[i]]) - row.top) * a.inverse;
      a.logprobs[i] = static_cast<float>(d - log_sum);
      if (a.entropy) a.entropy[i] = static_cast<float>(log_sum - row.dot / row.sum);
      a.stats[i] = row.top;
      a.stats[a.rows + i] = static_cast<float>(log_sum);
    }
  });
}

template <bool kEntropy, class T>
FINETUNE_INLINE void gradient(const TokenLogprobsBackward& a, int64_t i) {
  const T* logits = static_cast<const T*>(a.logits) + i * a.stride;
  T* out = static_cast<T*>(a.dlogits) + i * a.vocab;
  const float top = a.stats[i], log_sum = a.stats[a.rows + i], inverse = a.inverse;
  const float g = a.dlogprobs ? a.dlogprobs[i] * inverse : 0, h = kEntropy ? a.dentropy[i] * inverse : 0;
  const float entropy = kEntropy ? a.entropy[i] : 0;
  const auto pull = [&](vf v) {  // p · (g + h · (log p + entropy))
    const vf logp = distance(v, top, inverse) - log_sum, p = vexp(logp);
    return kEntropy ? p * (g + h * (logp + entropy)) : p * g;
  };
  for_each_vector(a.vocab, [&](int64_t j, auto get, auto put) { put(out + j, -pull(get(logits + j))); });
  const int64_t t = a.targets[i];  // from its logit, not from what was just rounded
  store_part(out + t, g - pull(set1(to_float(logits[t]))), 1);
}

template <class T>
void backward(const TokenLogprobsBackward& a) {
  parallel_for(a.rows, 1 + 16384 / (a.vocab + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (a.targets[i] == a.ignore_index) {
        std::memset(static_cast<T*>(a.dlogits) + i * a.vocab, 0, a.vocab * sizeof(T));
      } else {
        a.dentropy ? gradient<true, T>(a, i) : gradient<false, T>(a, i);
      }
    }
  });
}

Status token_logprobs(const TokenLogprobs& a) {
  a.dtype == DType::f32 ? forward<float>(a) : forward<bf16>(a);
  return Status::ok;
}

Status token_logprobs_backward(const TokenLogprobsBackward& a) {
  a.dtype == DType::f32 ? backward<float>(a) : backward<bf16>(a);
  return Status::ok;
}

FINETUNE_REGISTER(TokenLogprobs, token_logprobs);
FINETUNE_REGISTER(TokenLogprobsBackward, token_logprobs_backward);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
