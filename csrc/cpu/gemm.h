// Products of small fp32 blocks that sit in L1 or L2, and the packing that puts them there. Register tiles: a vector
// of B meets broadcast elements of A, so that A may be read by rows or by columns and B and C lie in whole vectors.
#pragma once

// The portable level's 16 lanes would live on the stack; SSE and NEON registers hold 4 floats, and tiles need
// registers.
#if FINETUNE_LANES == 16 && !defined(__AVX512F__) && !defined(FINETUNE_WIDE)
#ifdef FINETUNE_INLINE
#error "include gemm.h before simd.h"
#endif
#undef FINETUNE_LANES
#define FINETUNE_LANES 4
#endif

#include <utility>

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

// kTileRows × kTileVectors accumulators: at least FMA latency × throughput (8), and with the operands no more than the
// registers (16 of SSE, AVX2 and less than the 32 of NEON, AVX-512).
constexpr int kTileRows = kLanes == 16 ? 8 : 4, kTileVectors = 2, kStrip = kTileVectors * kLanes;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
FINETUNE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

enum class A { by_rows, by_columns };  // A(m, k) at a[m * lda + k], or at a[k * lda + m]
enum class C { set, add, scale_add };  // C = AB, C += AB, C = C · alpha + AB with one alpha a column

template <A kA, C kC, int kRows, int kVectors>
FINETUNE_INLINE void tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                          int64_t ldc, const float* alpha) {
  vf sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vf right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * ldb + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const vf left = set1(kA == A::by_rows ? a[r * lda + k] : a[k * lda + r]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + r * ldc + v * kLanes;
      if constexpr (kC == C::add) sum[r][v] += load(at);
      if constexpr (kC == C::scale_add) sum[r][v] += load(at) * load(alpha + v * kLanes);
      store(at, sum[r][v]);
    }
  }
}

template <A kA, C kC, int kRows, int kVectors>
FINETUNE_INLINE void last_rows(int64_t m, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                               float* c, int64_t ldc, const float* alpha) {
  if constexpr (kRows > 0) {
    if (m == kRows) return tile<kA, kC, kRows, kVectors>(depth, a, lda, b, ldb, c, ldc, alpha);
    last_rows<kA, kC, kRows - 1, kVectors>(m, depth, a, lda, b, ldb, c, ldc, alpha);
  }
}

template <A kA, C kC, int kVectors>
FINETUNE_INLINE void panel(int64_t m, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                           int64_t ldc, const float* alpha) {
  const int64_t step = kA == A::by_rows ? lda : 1;
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows) {
    tile<kA, kC, kTileRows, kVectors>(depth, a + i * step, lda, b, ldb, c + i * ldc, ldc, alpha);
  }
  last_rows<kA, kC, kTileRows - 1, kVectors>(m - i, depth, a + i * step, lda, b, ldb, c + i * ldc, ldc, alpha);
}

// C (m, n) from A (m, depth) and B (depth, n); n is a multiple of kLanes.
template <A kA, C kC>
__attribute__((noinline)) void gemm(int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda, const float* b,
                                    int64_t ldb, float* c, int64_t ldc, const float* alpha = nullptr) {
  int64_t j = 0;
  for (; j + kStrip <= n; j += kStrip) {
    panel<kA, kC, kTileVectors>(m, depth, a, lda, b + j, ldb, c + j, ldc, kC == C::scale_add ? alpha + j : nullptr);
  }
  for (; j < n; j += kLanes) {
    panel<kA, kC, 1>(m, depth, a, lda, b + j, ldb, c + j, ldc, kC == C::scale_add ? alpha + j : nullptr);
  }
}

template <bool kHigh, int kStep, int... kLane>
FINETUNE_INLINE vf exchange(vf a, vf b, std::integer_sequence<int, kLane...>) {
#if __has_builtin(__builtin_shufflevector)
#define FINETUNE_SHUFFLE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FINETUNE_SHUFFLE(...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
  return FINETUNE_SHUFFLE(
      (kHigh ? (kLane & kStep ? kLanes + kLane : kLane + kStep) : (kLane & kStep ? kLanes + kLane - kStep : kLane))...);
#undef FINETUNE_SHUFFLE
}

// The kLanes × kLanes matrix of x, in place: halves, quarters, … change places across the diagonal.
template <int kStep = kLanes / 2>
FINETUNE_INLINE void transpose(vf (&x)[kLanes]) {
  if constexpr (kStep > 0) {
    constexpr std::make_integer_sequence<int, kLanes> lanes;
    for (int i = 0; i < kLanes; ++i) {
      if (i & kStep) continue;
      const vf low = exchange<false, kStep>(x[i], x[i + kStep], lanes);
      x[i + kStep] = exchange<true, kStep>(x[i], x[i + kStep], lanes);
      x[i] = low;
    }
    transpose<kStep / 2>(x);
  }
}

// columns[d * ld + i] = rows[i][d] · factor for i < kLanes, d < dim; a null row gives zeros.
template <class T>
FINETUNE_INLINE void pack_columns(const T* const* rows, int64_t dim, float factor, float* columns, int64_t ld) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t n = smaller(dim - d, kLanes);
    vf x[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      x[i] = vf{};
      if (rows[i]) x[i] = (n == kLanes ? load(rows[i] + d) : load_part(rows[i] + d, n)) * factor;
    }
    transpose(x);
    if (n == kLanes) {
      for (int i = 0; i < kLanes; ++i) store(columns + (d + i) * ld, x[i]);
    } else {
      for (int i = 0; i < n; ++i) store(columns + (d + i) * ld, x[i]);
    }
  }
}

// rows[i][d] = columns[d * ld + i] · factor[i]; a null row is not written.
template <class T>
FINETUNE_INLINE void unpack_columns(const float* columns, int64_t ld, int64_t dim, vf factor, T* const* rows) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t n = smaller(dim - d, kLanes);
    vf x[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = i < n ? load(columns + (d + i) * ld) * factor : vf{};
    transpose(x);
    for (int i = 0; i < kLanes; ++i) {
      if (!rows[i]) continue;
      n == kLanes ? store(rows[i] + d, x[i]) : store_part(rows[i] + d, x[i], n);
    }
  }
}

// out[i * ld + d] = the row at rows + i * stride, for d < dim; zeros up to a whole vector.
template <class T>
FINETUNE_INLINE void pack_rows(const T* rows, int64_t stride, int64_t count, int64_t dim, float* out, int64_t ld) {
  for (int64_t i = 0; i < count; ++i) {
    for_each_vector(dim, [&](int64_t d, auto get, auto) { store(out + i * ld + d, get(rows + i * stride + d)); });
  }
}

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
