// LayerNorm of rows (Ba, Kiros & Hinton 2016, arXiv:1607.06450) with a factor and a term that the op gives, element i of
// each row by factor(i, get) and term(i, get): layer_norm has weights and biases, modulate a scale and a shift an item.
#pragma once

#include "row_blocks.h"

namespace finetune::FINETUNE_LEVEL {

// y = x̂ · factor + term of kRows rows, x̂ = (x − mean) · rstd, rstd = 1 / sqrt(mean((x − mean)²) + eps); the variance in
// a second pass, so that a large mean cancels nothing. mean, rstd: one a row, for the backward pass.
template <int kRows, class T, class Factor, class Term>
FINETUNE_INLINE void normalize_rows(const T* x, T* y, int64_t dim, float eps, float* means, float* rstds,
                                    Factor&& factor, Term&& term) {
  const float n = static_cast<float>(dim);
  float total[kRows], mean[kRows], rstd[kRows];
  sum_vectors(dim, total, [&](vf* sums, int64_t i, auto get) {
    for (int r = 0; r < kRows; ++r) sums[r] += get(x + r * dim + i);
  });
  float center[kRows][kLanes];  // the mean, loaded like x, so that the lanes past a row's end differ by zero
  for (int r = 0; r < kRows; ++r) {
    means[r] = mean[r] = total[r] / n;
    store(center[r], set1(mean[r]));
  }
  sum_vectors(dim, total, [&](vf* sums, int64_t i, auto get) {
    for (int r = 0; r < kRows; ++r) {
      const vf v = get(x + r * dim + i) - get(center[r]);
      sums[r] += v * v;
    }
  });
  for (int r = 0; r < kRows; ++r) rstds[r] = rstd[r] = 1.0f / __builtin_sqrtf(total[r] / n + eps);
  for_each_vector(dim, [&](int64_t i, auto get, auto put) {
    const vf multiply = factor(i, get), add = term(i, get);
    for (int r = 0; r < kRows; ++r) put(y + r * dim + i, (get(x + r * dim + i) - mean[r]) * rstd[r] * multiply + add);
  });
}

// dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)), g = dy · factor, of kRows rows; with kSums also adds dy · x̂ and dy to
// the sums dfactor and dterm (dim).
template <bool kSums, int kRows, class T, class Factor>
FINETUNE_INLINE void normalize_rows_backward(const T* x, const T* dy, T* dx, int64_t dim, const float* means,
                                             const float* rstds, float* dfactor, float* dterm, Factor&& factor) {
  const float n = static_cast<float>(dim);
  float mean[kRows], rstd[kRows], push[kRows], pull[kRows], dots[2 * kRows];  // dots: Σ g and Σ g · x̂ of each row
  for (int r = 0; r < kRows; ++r) mean[r] = means[r], rstd[r] = rstds[r];
  sum_vectors(dim, dots, [&](vf* total, int64_t i, auto get) {
    const vf multiply = factor(i, get);
    for (int r = 0; r < kRows; ++r) {
      const vf g = get(dy + r * dim + i) * multiply;
      total[2 * r] += g;
      total[2 * r + 1] += g * ((get(x + r * dim + i) - mean[r]) * rstd[r]);
    }
  });
  for (int r = 0; r < kRows; ++r) push[r] = dots[2 * r] / n, pull[r] = dots[2 * r + 1] / n;
  for_each_vector(dim, [&](int64_t i, auto get, auto put) {
    const vf multiply = factor(i, get);
    vf of_factor{}, of_term{};
    for (int r = 0; r < kRows; ++r) {
      const vf d = get(dy + r * dim + i), normal = (get(x + r * dim + i) - mean[r]) * rstd[r];
      put(dx + r * dim + i, (d * multiply - push[r] - normal * pull[r]) * rstd[r]);
      of_factor += d * normal;
      of_term += d;
    }
    if (kSums) {
      put(dfactor + i, get(dfactor + i) + of_factor);
      put(dterm + i, get(dterm + i) + of_term);
    }
  });
}

}  // namespace finetune::FINETUNE_LEVEL
