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
  parallel_for(a.rows, 1 + 16384 / (a.dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.dim;
      T* y = static_cast<T*>(a.y) + row * a.dim;
      const float squares = sum_vectors(a.dim, [&](int64_t i, auto get) { return get(x + i) * get(x + i); });
      const float rstd = 1.0f / __builtin_sqrtf(squares / static_cast<float>(a.dim) + a.eps);
      a.rstd[row] = rstd;
      for_each_vector(a.dim, [&](int64_t i, auto get, auto put) { put(y + i, get(x + i) * rstd * get(w + i)); });
    }
  });
}

template <class T, bool kWeightGrad>
void backward_rows(const RmsNormBackward& a, int64_t begin, int64_t end, float* dw) {
  const auto* w = static_cast<const T*>(a.weight);
  if (kWeightGrad) std::memset(dw, 0, a.dim * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.dim;
    const T* dy = static_cast<const T*>(a.dy) + row * a.dim;
    T* dx = static_cast<T*>(a.dx) + row * a.dim;
    const float rstd = a.rstd[row];
    const float dots = sum_vectors(a.dim, [&](int64_t i, auto get) { return get(dy + i) * get(w + i) * get(x + i); });
    const float pull = dots / static_cast<float>(a.dim) * rstd * rstd;
    for_each_vector(a.dim, [&](int64_t i, auto get, auto put) {
      const vf d = get(dy + i) * rstd, v = get(x + i);
      put(dx + i, d * get(w + i) - v * (pull * rstd));
      if (kWeightGrad) put(dw + i, get(dw + i) + d * v);
    });
  }
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
