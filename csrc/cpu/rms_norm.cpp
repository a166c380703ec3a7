// RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467): y = x · rstd · w, rstd = 1 / sqrt(mean(x²) + eps).
// Backward, with g = dy · w:   dx = rstd · (g − x · rstd² · mean(g · x)),   dw = Σ_rows dy · x · rstd.
//
// Memory: forward reads x and writes y once (a row of 576 floats stays in L1 between the two passes):
// 2 · rows · dim · bytes; backward reads dy and x and writes dx: 3 · rows · dim · bytes. About 4 and 10 FLOPs an
// element, so the roof is memory bandwidth. All arithmetic is fp32.
#include "finetune/rms_norm.h"

#include "row_blocks.h"
#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

static_assert(RmsNormBackward::blocks == kRowBlocks);

template <class T>
void forward(const RmsNorm& a) {
  const auto* w = static_cast<const T*>(a.weight);
  const int64_t dim = a.dim;
  for_each_pair(a.rows, dim, [&]<int kRows>(int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * dim;
    T* y = static_cast<T*>(a.y) + row * dim;
    float squares[kRows], rstd[kRows];
    sum_vectors(dim, squares, [&](vf* total, int64_t i, auto get) {
      for (int r = 0; r < kRows; ++r) total[r] += get(x + r * dim + i) * get(x + r * dim + i);
    });
    for (int r = 0; r < kRows; ++r) {
      rstd[r] = 1.0f / __builtin_sqrtf(squares[r] / static_cast<float>(dim) + a.eps);
      a.rstd[row + r] = rstd[r];
    }
    for_each_vector(dim, [&](int64_t i, auto get, auto put) {
      const vf scale = get(w + i);
      for (int r = 0; r < kRows; ++r) put(y + r * dim + i, get(x + r * dim + i) * rstd[r] * scale);
    });
  });
}

template <class T, bool kWeightGrad>
void backward_rows(const RmsNormBackward& a, int64_t begin, int64_t end, float* dw) {
  const auto* w = static_cast<const T*>(a.weight);
  const int64_t dim = a.dim;
  if (kWeightGrad) std::memset(dw, 0, dim * sizeof(float));
  in_pairs<kBackwardPairs<T>>(begin, end, [&]<int kRows>(int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * dim;
    const T* dy = static_cast<const T*>(a.dy) + row * dim;
    T* dx = static_cast<T*>(a.dx) + row * dim;
    float rstd[kRows], dots[kRows], pull[kRows];
    for (int r = 0; r < kRows; ++r) rstd[r] = a.rstd[row + r];
    sum_vectors(dim, dots, [&](vf* total, int64_t i, auto get) {
      const vf scale = get(w + i);
      for (int r = 0; r < kRows; ++r) total[r] += get(dy + r * dim + i) * scale * get(x + r * dim + i);
    });
    for (int r = 0; r < kRows; ++r) pull[r] = dots[r] / static_cast<float>(dim) * rstd[r] * rstd[r] * rstd[r];
    for_each_vector(dim, [&](int64_t i, auto get, auto put) {
      const vf scale = get(w + i);
      vf sum_dw{};
      for (int r = 0; r < kRows; ++r) {
        const vf d = get(dy + r * dim + i) * rstd[r], v = get(x + r * dim + i);
        put(dx + r * dim + i, d * scale - v * pull[r]);
        sum_dw += d * v;
      }
      if (kWeightGrad) put(dw + i, get(dw + i) + sum_dw);
    });
  });
}

template <class T>
void backward(const RmsNormBackward& a) {
  for_each_row_block(a.rows, a.dim, [&](int64_t block, int64_t begin, int64_t end) {
    if (a.dweight) {
      backward_rows<T, true>(a, begin, end, a.partial + block * a.dim);
    } else {
      backward_rows<T, false>(a, begin, end, nullptr);
    }
  });
  if (a.dweight) sum_blocks(a.rows, a.dim, a.partial, static_cast<T*>(a.dweight));
}

Status rms_norm(const RmsNorm& a) {
  a.dtype == DType::f32 ? forward<float>(a) : forward<bf16>(a);
  return Status::ok;
}

Status rms_norm_backward(const RmsNormBackward& a) {
  a.dtype == DType::f32 ? backward<float>(a) : backward<bf16>(a);
  return Status::ok;
}

FINETUNE_REGISTER(RmsNorm, rms_norm);
FINETUNE_REGISTER(RmsNormBackward, rms_norm_backward);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
