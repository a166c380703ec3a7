// LayerNorm (Ba, Kiros & Hinton 2016, arXiv:1607.06450): y = x̂ · w + b, x̂ = (x − mean) · rstd,
// rstd = 1 / sqrt(mean((x − mean)²) + eps); the variance in a second pass, so that a large mean cancels nothing.
// Backward, with g = dy · w:   dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),   dw = Σ_rows dy · x̂,   db = Σ_rows dy.
//
// Memory: forward reads x and writes y once (a row stays in L1 between the passes), backward reads dy and x and writes
// dx: 2 and 3 · rows · dim · bytes. About 7 and 13 FLOPs an element, so the roof is memory bandwidth. All arithmetic
// is fp32.
#include "finetune/layer_norm.h"

#include "normalized_rows.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

static_assert(LayerNormBackward::blocks == kRowBlocks);

template <class T>
void forward(const LayerNorm& a) {
  const auto* w = static_cast<const T*>(a.weight);
  const auto* b = static_cast<const T*>(a.bias);
  for_each_pair(a.rows, a.dim, [&]<int kRows>(int64_t row) {
    normalize_rows<kRows>(
        static_cast<const T*>(a.x) + row * a.dim, static_cast<T*>(a.y) + row * a.dim, a.dim, a.eps, a.mean + row,
        a.rstd + row, [&](int64_t i, auto get) { return get(w + i); },
        [&](int64_t i, auto get) { return b ? get(b + i) : vf{}; });
  });
}

template <class T, bool kParameterGrads>
void backward_rows(const LayerNormBackward& a, int64_t begin, int64_t end, float* dw, float* db) {
  const auto* w = static_cast<const T*>(a.weight);
  if (kParameterGrads) std::memset(dw, 0, a.dim * sizeof(float)), std::memset(db, 0, a.dim * sizeof(float));
  in_pairs<kBackwardPairs<T>>(begin, end, [&]<int kRows>(int64_t row) {
    const int64_t at = row * a.dim;
    normalize_rows_backward<kParameterGrads, kRows>(static_cast<const T*>(a.x) + at, static_cast<const T*>(a.dy) + at,
                                                    static_cast<T*>(a.dx) + at, a.dim, a.mean + row, a.rstd + row, dw,
                                                    db, [&](int64_t i, auto get) { return get(w + i); });
  });
}

template <class T>
void backward(const LayerNormBackward& a) {
  float* partial_bias = a.partial + a.blocks * a.dim;
  for_each_row_block(a.rows, a.dim, [&](int64_t block, int64_t begin, int64_t end) {
    if (a.dweight || a.dbias) {
      backward_rows<T, true>(a, begin, end, a.partial + block * a.dim, partial_bias + block * a.dim);
    } else {
      backward_rows<T, false>(a, begin, end, nullptr, nullptr);
    }
  });
  if (a.dweight) sum_blocks(a.rows, a.dim, a.partial, static_cast<T*>(a.dweight));
  if (a.dbias) sum_blocks(a.rows, a.dim, partial_bias, static_cast<T*>(a.dbias));
}

Status layer_norm(const LayerNorm& a) {
  a.dtype == DType::f32 ? forward<float>(a) : forward<bf16>(a);
  return Status::ok;
}

Status layer_norm_backward(const LayerNormBackward& a) {
  a.dtype == DType::f32 ? backward<float>(a) : backward<bf16>(a);
  return Status::ok;
}

FINETUNE_REGISTER(LayerNorm, layer_norm);
FINETUNE_REGISTER(LayerNormBackward, layer_norm_backward);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
