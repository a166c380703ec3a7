#include <cmath>
#include <cstdint>

extern "C" void launch(const float* x, float* y, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, x += columns, y += columns) {
    float largest = x[0];
    for (int64_t i = 1; i < columns; ++i) largest = x[i] > largest ? x[i] : largest;
    double total = 0.0;
    for (int64_t i = 0; i < columns; ++i) total += y[i] = std::exp(x[i] - largest);
    for (int64_t i = 0; i < columns; ++i) y[i] = static_cast<float>(y[i] / total);
  }
}
