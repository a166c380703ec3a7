// Cross-entropy with z-loss (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, §5) of logits that come in tiles of the
// vocabulary, joined as in the online softmax of Milakov & Gimelshein 2018 (arXiv:1805.02867):
//   lse = log Σ exp(l_j),   loss = lse − l_t + z · lse²,
//   d loss / d l_j = softmax(l)_j · (1 + 2 z lse) − [j = t].
//
// Memory: the first sweep reads a tile just multiplied, in blocks that stay in L1 between their maximum and their
// sum; the second overwrites it just before its products: 4 + 8 bytes a logit in fp32. About 20 FLOPs a logit each.
// Arithmetic is fp32; sums run over one block in lanes, and over blocks and tiles in double.
#include "finetune/linear_cross_entropy.h"

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int64_t kBlock = 2048;

FINETUNE_INLINE float exp_of(float x) { return vexp(set1(x))[0]; }

template <class T>
void softmax_sum(const T* logits, int64_t size, float* top_out, double* sum_out) {
  float top = -__builtin_inff();
  double sum_so_far = 0;
  for (int64_t start = 0; start < size; start += kBlock) {
    const T* block = logits + start;
    const int64_t n = size - start < kBlock ? size - start : kBlock, whole = n / kLanes * kLanes;
    vf tops = set1(top), sums{};
    for (int64_t j = 0; j < whole; j += kLanes) tops = vmax(load(block + j), tops);
    const float before = top;
    top = max(tops);
    for (int64_t j = whole; j < n; ++j) top = to_float(block[j]) > top ? to_float(block[j]) : top;
    for (int64_t j = 0; j < whole; j += kLanes) sums += vexp(load(block + j) - top);
    if (whole < n) {
      const vf rest = vexp(load_part(block + whole, n - whole) - top);
      for (int64_t j = 0; j < n - whole; ++j) sums[j] += rest[j];
    }
    sum_so_far = (before == top ? sum_so_far : sum_so_far * exp_of(before - top)) + sum(sums);
  }
  *top_out = top;
  *sum_out = sum_so_far;
}

template <class T>
void tile(const CrossEntropyTile& a) {
  for (int64_t row = 0; row < a.logits.rows; ++row) {
    const T* logits = static_cast<const T*>(a.logits.data) + row * a.logits.size;
    softmax_sum(logits, a.logits.size, a.top + row, a.sum + row);
    const int64_t at = a.logits.targets[row] - a.logits.first;
    if (at >= 0 && at < a.logits.size) a.hit[row] = to_float(logits[at]);
  }
}

template <class T>
void grad(const CrossEntropyGrad& a) {
  for (int64_t row = 0; row < a.logits.rows; ++row) {
    T* logits = static_cast<T*>(a.logits.data) + row * a.logits.size;
    const float top = a.top[row], factor = a.factor[row];
    for_each_vector(a.logits.size,
                    [&](int64_t i, auto get, auto put) { put(logits + i, vexp(get(logits + i) - top) * factor); });
    const int64_t at = a.logits.targets[row] - a.logits.first;
    if (at >= 0 && at < a.logits.size) {  // from its logit, not from what was just stored (and perhaps rounded)
      store_part(logits + at, set1(exp_of(a.hit[row] - top) * factor - a.scale), 1);
    }
  }
}

Status cross_entropy_tile(const CrossEntropyTile& a) {
  a.logits.dtype == DType::f32 ? tile<float>(a) : tile<bf16>(a);
  return Status::ok;
}

Status cross_entropy_grad(const CrossEntropyGrad& a) {
  a.logits.dtype == DType::f32 ? grad<float>(a) : grad<bf16>(a);
  return Status::ok;
}

Status cross_entropy_loss(const CrossEntropyLoss& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    float top = -__builtin_inff();
    for (int64_t t = 0; t < a.tiles; ++t) top = a.tops[t * a.stride + row] > top ? a.tops[t * a.stride + row] : top;
    double total = 0;
    for (int64_t t = 0; t < a.tiles; ++t) {
      total += a.sums[t * a.stride + row] * exp_of(a.tops[t * a.stride + row] - top);
    }
    const float log_sum = static_cast<float>(__builtin_log(total)), lse = top + log_sum;
    a.loss[row] = (top - a.hits[row]) + log_sum + a.z_loss * lse * lse;
    a.top[row] = top;
    a.factor[row] = static_cast<float>((1 + 2.0 * a.z_loss * lse) / total) * a.scale;
  }
  return Status::ok;
}

template <class P, class T>
void sum_parts(const SumParts& a) {
  constexpr int64_t kPiece = 4096;
  const P* parts = static_cast<const P*>(a.parts);
  T* out = static_cast<T*>(a.out);
  parallel_for((a.size + kPiece - 1) / kPiece, 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece, last = end * kPiece < a.size ? end * kPiece : a.size;
    for_each_vector(last - first, [&](int64_t i, auto get, auto put) {
      vf total{};
      for (int64_t part = 0; part < a.count; ++part) total += get(parts + part * a.size + first + i);
      put(out + first + i, total);
    });
  });
}

Status sum_of_parts(const SumParts& a) {
  if (a.part_dtype == DType::f32) {
    a.out_dtype == DType::f32 ? sum_parts<float, float>(a) : sum_parts<float, bf16>(a);
  } else {
    a.out_dtype == DType::f32 ? sum_parts<bf16, float>(a) : sum_parts<bf16, bf16>(a);
  }
  return Status::ok;
}

Status add_part(const AddPart& a) {
  const auto* part = static_cast<const bf16*>(a.part);
  for_each_vector(a.size, [&](int64_t i, auto get, auto put) {
    const vf value = get(part + i);
    put(a.sum + i, a.add ? get(a.sum + i) + value : value);
  });
  return Status::ok;
}

FINETUNE_REGISTER(CrossEntropyTile, cross_entropy_tile);
FINETUNE_REGISTER(CrossEntropyLoss, cross_entropy_loss);
FINETUNE_REGISTER(CrossEntropyGrad, cross_entropy_grad);
FINETUNE_REGISTER(SumParts, sum_of_parts);
FINETUNE_REGISTER(AddPart, add_part);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
