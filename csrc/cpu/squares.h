// Sums of squares, in double precision: a square of a float never overflows there.
#pragma once

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {

// Half a vector of floats and the doubles it becomes: a whole one would make gcc convert element by element.
typedef float half_f __attribute__((vector_size(2 * kLanes)));
typedef double half_d __attribute__((vector_size(4 * kLanes)));

FINETUNE_INLINE void add_squares(vf x, half_d* totals) {
  half_f halves[2];
  std::memcpy(halves, &x, sizeof x);
  for (int i = 0; i < 2; ++i) {
    const half_d wide = __builtin_convertvector(halves[i], half_d);
    totals[i] += wide * wide;
  }
}

// Σ of the squares of what value(i, load) and value(i, load, store) give for each vector of n elements. Two vectors are
// in flight, so that the additions need not wait for each other.
template <class Value>
FINETUNE_INLINE double sum_squares(int64_t n, Value&& value) {
  half_d totals[4] = {};
  const auto get = [](auto* p) { return load(p); };
  const auto put = [](auto* p, vf x) { store(p, x); };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    add_squares(value(i, get, put), totals);
    add_squares(value(i + kLanes, get, put), totals + 2);
  }
  for_each_vector(n - i,
                  [&](int64_t j, auto part, auto put_part) { add_squares(value(i + j, part, put_part), totals); });
  const half_d total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
  double out = 0;
  for (int lane = 0; lane < kLanes / 2; ++lane) out += total[lane];
  return out;
}

// Σ x² faster: runs of eight vectors are summed in fp32. Where that could have overflowed or vanished, all again in
// double precision.
template <class T>
FINETUNE_INLINE double sum_squares_of(const T* x, int64_t n) {
  constexpr int kRun = 8 * kLanes;
  half_d totals[2] = {};
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    vf parts[4] = {};
    for (int j = 0; j < 8; ++j) {
      const vf v = load(x + i + j * kLanes);
      parts[j % 4] += v * v;
    }
    const vf part = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    half_f halves[2];
    std::memcpy(halves, &part, sizeof part);
    for (int j = 0; j < 2; ++j) totals[j] += __builtin_convertvector(halves[j], half_d);
  }
  const half_d total = totals[0] + totals[1];
  double out = sum_squares(n - i, [&](int64_t j, auto get, auto) { return get(x + i + j); });
  for (int lane = 0; lane < kLanes / 2; ++lane) out += total[lane];
  if (out > 1e-20 && out < 1e38) return out;
  return sum_squares(n, [&](int64_t j, auto get, auto) { return get(x + j); });
}

}  // namespace finetune::FINETUNE_LEVEL
