// adaLN's modulation (Peebles & Xie 2023, arXiv:2212.09748, §3.2): y = x̂ · (1 + scale) + shift, x̂ = (x − mean) · rstd,
// with a scale and a shift an item; the variance in a second pass, so that a large mean cancels nothing.
// Backward, with g = dy · (1 + scale):   dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),
// dscale = Σ_rows dy · x̂,   dshift = Σ_rows dy over the rows of an item.
//
// Memory: forward reads x and writes y once (a row stays in L1 between the passes), backward reads dy and x and writes
// dx. About 7 and 13 FLOPs an element, so the roof is memory bandwidth. All arithmetic is fp32.
#include "finetune/modulate.h"

#include "item_blocks.h"
#include "normalized_rows.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

template <class T>
void forward(const Modulate& a) {
  for_each_item_block(a.items, a.rows, a.dim, [&](int64_t item, int64_t, int64_t begin, int64_t end) {
    const T *scale = static_cast<const T*>(a.scale) + item * a.scale_stride,
            *shift = static_cast<const T*>(a.shift) + item * a.shift_stride;
    in_pairs<true>(begin, end, [&]<int kRows>(int64_t row) {
      normalize_rows<kRows>(
          static_cast<const T*>(a.x) + row * a.dim, static_cast<T*>(a.y) + row * a.dim, a.dim, a.eps, a.mean + row,
          a.rstd + row, [&](int64_t i, auto get) { return get(scale + i) + 1.0f; },
          [&](int64_t i, auto get) { return get(shift + i); });
    });
  });
}

template <class T>
void backward(const ModulateBackward& a) {
  const int64_t dim = a.dim, sums = cpu_item_blocks(a.items, a.rows) * a.items * dim;
  for_each_item_block(a.items, a.rows, dim, [&](int64_t item, int64_t block, int64_t begin, int64_t end) {
    const T* scale = static_cast<const T*>(a.scale) + item * a.scale_stride;
    float *dscale = a.partial + (block * a.items + item) * dim, *dshift = dscale + sums;
    std::memset(dscale, 0, dim * sizeof(float)), std::memset(dshift, 0, dim * sizeof(float));
    in_pairs<kBackwardPairs<T>>(begin, end, [&]<int kRows>(int64_t row) {
      const int64_t at = row * dim;
      normalize_rows_backward<true, kRows>(static_cast<const T*>(a.x) + at, static_cast<const T*>(a.dy) + at,
                                           static_cast<T*>(a.dx) + at, dim, a.mean + row, a.rstd + row, dscale, dshift,
                                           [&](int64_t i, auto get) { return get(scale + i) + 1.0f; });
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
