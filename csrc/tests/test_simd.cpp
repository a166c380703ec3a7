// csrc/cpu/simd.h at one level, without torch: exp, bf16 rounding, tails. Exit 77 = this machine lacks the level.
#include <algorithm>
#include <cstdio>
#include <limits>

#include "simd.h"

using namespace finetune;
using namespace finetune::FINETUNE_LEVEL;

static int failures = 0;
#define EXPECT(condition)                                 \
  do {                                                    \
    if (!(condition)) {                                   \
      std::printf("line %d: %s\n", __LINE__, #condition); \
      ++failures;                                         \
    }                                                     \
  } while (0)

static float vexp1(float x) { return vexp(set1(x))[kLanes - 1]; }

static uint16_t round_bf16(float x) {
  bf16 out[kLanes];
  store(out, set1(x));
  return out[kLanes - 1].bits;
}

int main() {
  if (Level::FINETUNE_LEVEL > supported_level()) return 77;
  const float inf = std::numeric_limits<float>::infinity();
  double worst = 0;
  for (double x = -86.97; x < 88.7; x += 0.00137) {
    const float xf = static_cast<float>(x);
    const double want = std::exp(static_cast<double>(xf));
    worst = std::max(worst, std::fabs(vexp1(xf) - want) / want);
  }
  std::printf("exp: largest relative error %.2g\n", worst);
  EXPECT(worst < 2.0e-7);
  EXPECT(vexp1(0) == 1);
  EXPECT(vexp1(-inf) == 0 && vexp1(-1e30f) == 0 && vexp1(-87) == 0);
  EXPECT(vexp1(inf) == inf && vexp1(1e30f) == inf && vexp1(89) == inf);
  EXPECT(vexp1(std::nanf("")) != vexp1(std::nanf("")));

  float ramp[kLanes];
  for (int i = 0; i < kLanes; ++i) ramp[i] = static_cast<float>(i % 3 ? i : -i);
  float total = 0, top = 0;
  for (float x : ramp) total += x, top = std::max(top, x);
  EXPECT(sum(load(ramp)) == total && max(load(ramp)) == top && max(set1(-2)) == -2);
  EXPECT(vmax(load(ramp), set1(1))[0] == 1 && vmin(load(ramp), set1(1))[2] == 1);
  EXPECT(select(load(ramp) > 0, set1(5), set1(7))[1] == 5 && select(load(ramp) > 0, set1(5), set1(7))[0] == 7);

  EXPECT(round_bf16(1.0f) == 0x3f80);
  EXPECT(round_bf16(1.00390625f) == 0x3f80);  // tie: to even
  EXPECT(round_bf16(1.01171875f) == 0x3f82);  // tie: to even
  EXPECT(round_bf16(1.00390637f) == 0x3f81);  // above the tie
  EXPECT(round_bf16(-0.0f) == 0x8000);
  EXPECT(round_bf16(3.4e38f) == 0x7f80);  // past the largest bf16: infinity
  EXPECT(round_bf16(inf) == 0x7f80);
  for (const uint32_t nan : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu}) {
    float x;
    std::memcpy(&x, &nan, sizeof x);
    EXPECT((round_bf16(x) & 0x7fc0) == 0x7fc0);  // quiet, whatever its payload
  }
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {  // every bf16 that is no NaN survives both ways
    bf16 in[kLanes];
    for (bf16& x : in) x.bits = static_cast<uint16_t>(bits);
    if ((bits & 0x7fff) <= 0x7f80) EXPECT(round_bf16(load(in)[kLanes - 1]) == bits);
  }

  for (int64_t n = 0; n <= 3 * kLanes; ++n) {
    float in[4 * kLanes], out[4 * kLanes];
    for (int i = 0; i < 4 * kLanes; ++i) in[i] = i + 1, out[i] = -1;
    for_each_vector(n, [&](int64_t i, auto get, auto put) { put(out + i, get(in + i) * 2.0f); });
    for (int i = 0; i < 4 * kLanes; ++i) EXPECT(out[i] == (i < n ? 2 * in[i] : -1));
  }
  std::printf("%s, %d lanes: %d failures\n", kLevelNames[static_cast<int>(Level::FINETUNE_LEVEL)], kLanes, failures);
  return failures != 0;
}
