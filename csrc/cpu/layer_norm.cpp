// LayerNorm (Ba, Kiros & Hinton 2016, arXiv:1607.06450): y = x̂ · w + b, x̂ = (x − mean) · rstd,
// rstd = 1 / sqrt(mean((x − mean)²) + eps); the variance in a second pass, so that a large mean cancels nothing.
// Backward, with g = dy · w:   dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),   dw = Σ_rows dy · x̂,   db = Σ_rows dy.
//
// Memory: forward reads x and writes y once (a row stays in L1 between the passes), backward reads dy and x and writes
// dx: 2 and 3 · rows · dim · bytes. About 7 and 13 FLOPs an element, so the roof is memory bandwidth. All arithmetic
// is fp32.
#include "finetune/layer_norm.h"

#include "row_blocks.h"
#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

static_assert(LayerNormBackward::blocks == kRowBlocks);

template <class T>
void forward(const LayerNorm& a) {
  const auto* w = static_cast<const T*>(a.weight);
  const auto* b = static_cast<const T*>(a.bias);
  const int64_t dim = a.dim;
  const float n = static_cast<float>(dim);
  for_each_pair(a.rows, dim, [&]<int kRows>(int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * dim;
    T* y = static_cast<T*>(a.y) + row * dim;
    float total[kRows], mean[kRows], rstd[kRows];
    sum_vectors(dim, total, [&](vf* sums, int64_t i, auto get) {
      for (int r = 0; r < kRows; ++r) sums[r] += get(x + r * dim + i);
    });
    float center[kRows][kLanes];  // the mean, loaded like x, so that the lanes past a row's end differ by zero
    for (int r = 0; r < kRows; ++r) {
      a.mean[row + r] = mean[r] = total[r] / n;
      store(center[r], set1(mean[r]));
    }
    sum_vectors(dim, total, [&](vf* sums, int64_t i, auto get) {
      for (int r = 0; r < kRows; ++r) {
        const vf v = get(x + r * dim + i) - get(center[r]);
        sums[r] += v * v;
      }
    });
    for (int r = 0; r < kRows; ++r) a.rstd[row + r] = rstd[r] = 1.0f / __builtin_sqrtf(total[r] / n + a.eps);
    for_each_vector(dim, [&](int64_t i, auto get, auto put) {
      const vf scale = get(w + i), shift = b ? get(b + i) : vf{};
      for (int r = 0; r < kRows; ++r) put(y + r * dim + i, (get(x + r * dim + i) - mean[r]) * rstd[r] * scale + shift);
    });
  });
}

template <class T, bool kParameterGrads>
void backward_rows(const LayerNormBackward& a, int64_t begin, int64_t end, float* dw, float* db) {
  const auto* w = static_cast<const T*>(a.weight);
  const int64_t dim = a.dim;
  const float n = static_cast<float>(dim);
  if (kParameterGrads) std::memset(dw, 0, dim * sizeof(float)), std::memset(db, 0, dim * sizeof(float));
  in_pairs<kBackwardPairs<T>>(begin, end, [&]<int kRows>(int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * dim;
    const T* dy = static_cast<const T*>(a.dy) + row * dim;
    T* dx = static_cast<T*>(a.dx) + row * dim;
    float mean[kRows], rstd[kRows], push[kRows], pull[kRows], dots[2 * kRows];  // dots: Σ g and Σ g · x̂ of each row
    for (int r = 0; r < kRows; ++r) mean[r] = a.mean[row + r], rstd[r] = a.rstd[row + r];
    sum_vectors(dim, dots, [&](vf* total, int64_t i, auto get) {
      const vf scale = get(w + i);
      for (int r = 0; r < kRows; ++r) {
        const vf g = get(dy + r * dim + i) * scale;
        total[2 * r] += g;
        total[2 * r + 1] += g * ((get(x + r * dim + i) - mean[r]) * rstd[r]);
      }
    });
    for (int r = 0; r < kRows; ++r) push[r] = dots[2 * r] / n, pull[r] = dots[2 * r + 1] / n;
    for_each_vector(dim, [&](int64_t i, auto get, auto put) {
      const vf scale = get(w + i);
      vf sum_dw{}, sum_db{};
      for (int r = 0; r < kRows; ++r) {
        const vf d = get(dy + r * dim + i), normal = (get(x + r * dim + i) - mean[r]) * rstd[r];
        put(dx + r * dim + i, (d * scale - push[r] - normal * pull[r]) * rstd[r]);
        sum_dw += d * normal;
        sum_db += d;
      }
      if (kParameterGrads) {
        put(dw + i, get(dw + i) + sum_dw);
        put(db + i, get(db + i) + sum_db);
      }
    });
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
