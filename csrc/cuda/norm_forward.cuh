// The statistics of a row that LayerNorm and adaLN's modulation normalize by (layer_norm.cu, modulate.cu).
#pragma once

#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {

struct RowStatistics {
  float mean, rstd;  // 1 / sqrt(mean((x − mean)²) + eps)
};

// Of a row x (n_cols) by all threads of a block. The variance has a pass for itself, so that a large mean cancels
// nothing; the second pass over the row, and the caller's, are served by L1.
template <class T>
__device__ __forceinline__ RowStatistics row_statistics(const T* x, int64_t n_cols, bool aligned, float eps) {
  constexpr int V = kVector<T>;
  const auto count = static_cast<float>(n_cols);
  float sum = 0, squares = 0;
  for_each_group<V>(n_cols, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += to_float(v.at[j]);
  });
  const float mean = block_sum(sum) / count;
  for_each_group<V>(n_cols, aligned, [&]<int N>(int64_t i) {
    const auto v = load<T, N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) squares += (to_float(v.at[j]) - mean) * (to_float(v.at[j]) - mean);
  });
  const float variance = block_sum(squares) / count;
  return {mean, rsqrtf(variance + eps)};
}

}  // namespace finetune
