// adaLN's modulation (Peebles & Xie 2023, arXiv:2212.09748, §3.2): y = x̂ · (1 + scale) + shift, x̂ = (x − mean) · rstd,
// with a scale and a shift an item; the variance in a second pass, so that a large mean cancels nothing.
// Backward, with g = dy · (1 + scale):   dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),
// dscale = Σ_rows dy · x̂,   dshift = Σ_rows dy over the rows of an item.
//
// Memory: forward reads x and writes y once (a row stays in L1 between the passes), backward reads dy and x and writes
// dx. About 7 and 13 FLOPs an element, so the roof is memory bandwidth. All arithmetic is fp32.
#include "finetune/modulate.h"

#include "item_blocks.h"
#include "row_blocks.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

template <class T>
void forward(const Modulate& a) {
  const int64_t dim = a.dim;
  const float n = static_cast<float>(dim);
  for_each_item_block(a.items, a.rows, dim, [&](int64_t item, int64_t, int64_t begin, int64_t end) {
    const T *scale = static_cast<const T*>(a.scale) + item * a.scale_stride,
            *shift = static_cast<const T*>(a.shift) + item * a.shift_stride;
    in_pairs<true>(begin, end, [&]<int kRows>(int64_t row) {
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
        const vf factor = get(scale + i) + 1.0f, add = get(shift + i);
        for (int r = 0; r < kRows; ++r) {
          put(y + r * dim + i, (get(x + r * dim + i) - mean[r]) * rstd[r] * factor + add);
        }
      });
    });
  });
}

template <class T>
void backward(const ModulateBackward& a) {
  const int64_t dim = a.dim, sums = cpu_item_blocks(a.items, a.rows) * a.items * dim;
  const float n = static_cast<float>(dim);
  for_each_item_block(a.items, a.rows, dim, [&](int64_t item, int64_t block, int64_t begin, int64_t end) {
    const T* scale = static_cast<const T*>(a.scale) + item * a.scale_stride;
    float *dscale = a.partial + (block * a.items + item) * dim, *dshift = dscale + sums;
    std::memset(dscale, 0, dim * sizeof(float)), std::memset(dshift, 0, dim * sizeof(float));
    in_pairs<kBackwardPairs<T>>(begin, end, [&]<int kRows>(int64_t row) {
      const T *x = static_cast<const T*>(a.x) + row * dim, *dy = static_cast<const T*>(a.dy) + row * dim;
      T* dx = static_cast<T*>(a.dx) + row * dim;
      float mean[kRows], rstd[kRows], push[kRows], pull[kRows], dots[2 * kRows];  // Σ g and Σ g · x̂ of each row
      for (int r = 0; r < kRows; ++r) mean[r] = a.mean[row + r], rstd[r] = a.rstd[row + r];
      sum_vectors(dim, dots, [&](vf* total, int64_t i, auto get) {
        const vf factor = get(scale + i) + 1.0f;
        for (int r = 0; r < kRows; ++r) {
          const vf g = get(dy + r * dim + i) * factor;
          total[2 * r] += g;
          total[2 * r + 1] += g * ((get(x + r * dim + i) - mean[r]) * rstd[r]);
        }
      });
      for (int r = 0; r < kRows; ++r) push[r] = dots[2 * r] / n, pull[r] = dots[2 * r + 1] / n;
      for_each_vector(dim, [&](int64_t i, auto get, auto put) {
        const vf factor = get(scale + i) + 1.0f;
        vf sum_scale{}, sum_shift{};
        for (int r = 0; r < kRows; ++r) {
          const vf d = get(dy + r * dim + i), normal = (get(x + r * dim + i) - mean[r]) * rstd[r];
          put(dx + r * dim + i, (d * factor - push[r] - normal * pull[r]) * rstd[r]);
          sum_scale += d * normal;
          sum_shift += d;
        }
        put(dscale + i, get(dscale + i) + sum_scale);
        put(dshift + i, get(dshift + i) + sum_shift);
      });
    });
  });
  sum_item_blocks(a.items, a.rows, dim, a.partial, static_cast<T*>(a.dscale));
  sum_item_blocks(a.items, a.rows, dim, a.partial + sums, static_cast<T*>(a.dshift));
}

Status modulate(const Modulate& a) {
  a.dtype == DType::f32 ? forward<float>(a) : forward<bf16>(a);
  return Status::ok;
}

Status modulate_backward(const ModulateBackward& a) {
  a.dtype == DType::f32 ? backward<float>(a) : backward<bf16>(a);
  return Status::ok;
}

FINETUNE_REGISTER(Modulate, modulate);
FINETUNE_REGISTER(ModulateBackward, modulate_backward);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
