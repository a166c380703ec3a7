// Cross-entropy with z-loss of rows of logits (z-loss: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, §5), by the
// online softmax of Milakov & Gimelshein 2018 (arXiv:1805.02867), block by block:
//   lse = log Σ exp(l_j),   loss = lse − l_t + z · lse²,
//   d loss / d l_j = softmax(l)_j · (1 + 2 z lse) − [j = t].
//
// Memory: one sweep reads a row in blocks that stay in L1 between their maximum and their sum; with gradients a
// second sweep, the row still in L2, overwrites it: 4 + 8 bytes a logit in fp32. About 30 FLOPs a logit a sweep.
// Arithmetic is fp32; sums run over one block in lanes, and over blocks in double.
#include "finetune/linear_cross_entropy.h"

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int64_t kBlock = 2048;

struct Softmax {
  float top;   // the maximum
  double sum;  // Σ exp(l − top)
};

template <class T>
Softmax softmax_of(const T* logits, int64_t vocab) {
  Softmax out{-__builtin_inff(), 0};
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const T* block = logits + start;
    const int64_t size = vocab - start < kBlock ? vocab - start : kBlock;
    vf tops = set1(out.top);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) tops = vmax(load(block + i), tops);
    float top = max(tops);
    for (int64_t j = i; j < size; ++j) top = to_float(block[j]) > top ? to_float(block[j]) : top;
    vf sums{};
    for (int64_t j = 0; j < i; j += kLanes) sums += vexp(load(block + j) - top);
    float total = sum(sums);
    if (i < size) {
      const vf rest = vexp(load_part(block + i, size - i) - top);
      for (int64_t j = 0; j < size - i; ++j) total += rest[j];
    }
    // A first block of -inf only has top = -inf: the sum is NaN then, as torch's.
    if (top > out.top) out.sum *= vexp(set1(out.top - top))[0];
    out.top = top;
    out.sum += total;
  }
  return out;
}

template <class T>
void rows(const CrossEntropyRows& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* logits = static_cast<T*>(a.logits) + row * a.vocab;
    const int64_t target = a.targets[row];
    const Softmax softmax = softmax_of(logits, a.vocab);
    const float log_sum = static_cast<float>(__builtin_log(softmax.sum)), lse = softmax.top + log_sum;
    const float hit = to_float(logits[target]);
    a.loss[row] = (softmax.top - hit) + log_sum + a.z_loss * lse * lse;
    if (!a.grad) continue;
    const float top = softmax.top;
    const float factor = static_cast<float>((1 + 2.0 * a.z_loss * lse) / softmax.sum) * a.scale;
    for_each_vector(a.vocab, [&](int64_t i, auto get, auto put) { put(logits + i, vexp(get(logits + i) - top) * factor); });
    // The target's own entry from its logit, not from the stored (perhaps rounded) one.
    const float at_target = vexp(set1(hit - top))[0] * factor - a.scale;
    T rounded[kLanes];
    store(rounded, set1(at_target));
    logits[target] = rounded[0];
  }
}

Status cross_entropy_rows(const CrossEntropyRows& a) {
  parallel_for(a.rows, 1, [&](int64_t begin, int64_t end) {
    a.dtype == DType::f32 ? rows<float>(a, begin, end) : rows<bf16>(a, begin, end);
  });
  return Status::ok;
}

Status add_rounded(const AddRounded& a) {
  constexpr int64_t kPiece = 32768;
  const auto* part = static_cast<const bf16*>(a.part);
  parallel_for((a.size + kPiece - 1) / kPiece, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece, last = end * kPiece < a.size ? end * kPiece : a.size;
    for_each_vector(last - first, [&](int64_t i, auto get, auto put) {
      const vf value = get(part + first + i);
      put(a.sum + first + i, a.add ? get(a.sum + first + i) + value : value);
    });
  });
  return Status::ok;
}

FINETUNE_REGISTER(CrossEntropyRows, cross_entropy_rows);
FINETUNE_REGISTER(AddRounded, add_rounded);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
