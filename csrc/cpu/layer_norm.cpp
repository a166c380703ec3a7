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
  const float n = static_cast<float>(a.dim);
  parallel_for(a.rows, 1 + 16384 / (a.dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.dim;
      T* y = static_cast<T*>(a.y) + row * a.dim;
      const float mean = sum_vectors(a.dim, [&](int64_t i, auto get) { return get(x + i); }) / n;
      float centre[kLanes];  // loaded like x, so that the lanes past a row's end differ by zero
      store(centre, set1(mean));
      const float squares = sum_vectors(a.dim, [&](int64_t i, auto get) {
        const vf v = get(x + i) - get(centre);
        return v * v;
      });
      const float rstd = 1.0f / __builtin_sqrtf(squares / n + a.eps);
      a.mean[row] = mean;
      a.rstd[row] = rstd;
      for_each_vector(a.dim, [&](int64_t i, auto get, auto put) {
        const vf v = (get(x + i) - mean) * rstd * get(w + i);
        put(y + i, b ? v + get(b + i) : v);
      });
    }
  });
}

template <class T, bool kParameterGrads>
void backward_rows(const LayerNormBackward& a, int64_t begin, int64_t end, float* dw, float* db) {
  const auto* w = static_cast<const T*>(a.weight);
  const float n = static_cast<float>(a.dim);
  if (kParameterGrads) std::memset(dw, 0, a.dim * sizeof(float)), std::memset(db, 0, a.dim * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.dim;
    const T* dy = static_cast<const T*>(a.dy) + row * a.dim;
    T* dx = static_cast<T*>(a.dx) + row * a.dim;
    const float mean = a.mean[row], rstd = a.rstd[row];
    const float push = sum_vectors(a.dim, [&](int64_t i, auto get) { return get(dy + i) * get(w + i); }) / n;
    const float pull =
        sum_vectors(a.dim,
                    [&](int64_t i, auto get) { return get(dy + i) * get(w + i) * ((get(x + i) - mean) * rstd); }) /
        n;
    for_each_vector(a.dim, [&](int64_t i, auto get, auto put) {
      const vf d = get(dy + i), normal = (get(x + i) - mean) * rstd;
      put(dx + i, (d * get(w + i) - push - normal * pull) * rstd);
      if (kParameterGrads) {
        put(dw + i, get(dw + i) + d * normal);
        put(db + i, get(db + i) + d);
      }
    });
  }
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
