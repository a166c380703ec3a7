// y[r] = w_scale[r] · x_scale · Σ_i w[r, i] · x[i] with w (rows, columns) and x (columns) in int8 → y (rows) in fp32.
//
// The sum is exact, in int32 (columns ≤ 100,000): a product of two int8 does not fit into int8 or, many of them, into
// int16. Several sums that do not wait for each other; the scales are multiplied once a row.
#include <cstdint>

namespace {

int32_t dot(const int8_t* a, const int8_t* b, int64_t n) {
  // write this
  constexpr int LANES = 16;
  int32_t sums[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) sums[lane] += int32_t{a[i + lane]} * int32_t{b[i + lane]};
  for (; i < n; ++i) sums[0] += int32_t{a[i]} * int32_t{b[i]};
  int32_t total = 0;
  for (const int32_t sum : sums) total += sum;
  return total;
  // written
}

}  // namespace

extern "C" void launch(const int8_t* w, const float* w_scale, const int8_t* x, const float* x_scale, float* y,
                       int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row)
    y[row] = w_scale[row] * x_scale[0] * static_cast<float>(dot(w + row * columns, x, columns));
}
