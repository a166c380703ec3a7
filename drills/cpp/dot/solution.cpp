// The dot product of a and b, n numbers in fp32, any n → one fp32 number.
//
// Fast means several sums that do not wait for each other: one running sum takes the latency of an addition, about four
// cycles, for every element. Use at least eight independent sums, which the compiler then keeps in vector registers.
#include <cstdint>

namespace {

float dot(const float* a, const float* b, int64_t n) {
  // write this
  constexpr int LANES = 16;
  float sums[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  float total = 0.0f;
  for (; i < n; ++i) total += a[i] * b[i];
  for (int lane = 0; lane < LANES; ++lane) total += sums[lane];
  return total;
  // written
}

}  // namespace

extern "C" void launch(const float* a, const float* b, float* result, int64_t n) { *result = dot(a, b, n); }
