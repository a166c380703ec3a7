// csrc/cpu/packed_product.h with AMX's tile instructions in plain C++ (FINETUNE_EMULATED_TILES), which need AVX-512 with
// VNNI and BF16: against sums in double, and that a row has the same bits in any company. Exit 77 = not this machine.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "packed_product.h"

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

struct Case {
  PackedWeight w;
  std::vector<uint32_t> codes;
  std::vector<float> scale, minimum, dense;  // dense: (rows, depth)
};

static float rounded(float x) {
  bf16 out[kLanes];
  store(out, set1(x));
  return to_float(out[0]);
}

static Case random_case(WeightFormat format, int64_t rows, int64_t depth, int64_t group, bool minima, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> real(0.5f, 1.5f);
  Case c{{format, rows, depth, group, nullptr, nullptr, nullptr, false}, {}, {}, {}, {}};
  PackedWeight& w = c.w;
  c.codes.assign(w.panels() * w.words() * kPanel, format == WeightFormat::int8 ? 0x80808080u : 0);
  c.scale.assign(w.panels() * w.groups() * kPanel, 0.0f);
  c.minimum = c.scale;
  for (int64_t i = 0; i < static_cast<int64_t>(c.scale.size()); ++i)
    c.scale[i] = real(random), c.minimum[i] = -8 * real(random);
  c.dense.resize(rows * depth);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t panel = n / kPanel, lane = n % kPanel,
                    at = (panel * w.groups() + (group ? k / group : 0)) * kPanel + lane;
      const auto word = [&](int64_t i) -> uint32_t& { return c.codes[(panel * w.words() + i) * kPanel + lane]; };
      float value;
      if (format == WeightFormat::bf16) {
        value = rounded(real(random) - 1);
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        word(k / 2) |= bits >> 16 << (16 * (k % 2));
      } else if (format == WeightFormat::int8) {
        const int code = static_cast<int>(random() % 256) - 128;
        word(k / 4) &= ~(0xffu << (8 * (k % 4)));
        word(k / 4) |= static_cast<uint32_t>(code + 128) << (8 * (k % 4));
        value = c.scale[at] * static_cast<float>(code);
      } else if (format == WeightFormat::nf4) {
        const uint32_t code = random() % 16;
        word(k / 8) |= code << (8 * (k % 4) + (k % 8 < 4 ? 0 : 4));
        value = c.scale[at] * kNf4[code];
      } else {
        const uint32_t code = random() % 16;
        word(k / 8) |= code << (8 * (k % 4) + (k % 8 < 4 ? 0 : 4));
        value = c.scale[at] * static_cast<float>(code) + (minima ? c.minimum[at] : -8 * c.scale[at]);
      }
      c.dense[n * depth + k] = value;
    }
  }
  w.codes = c.codes.data();
  if (format != WeightFormat::bf16) w.scale = c.scale.data();
  if (minima) w.minimum = c.minimum.data();
  return c;
}

static std::vector<float> multiply(const PackedWeight& w, const std::vector<float>& x, int64_t first, int64_t m) {
  std::vector<char> memory(prepared_bytes(m, w.depth) + 64);
  char* workspace = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 63);
  const Prepared p = prepared(w, m, false, workspace);
  const bool integers = w.format == WeightFormat::int8 || w.format == WeightFormat::int4;
  EXPECT(p.kind == (integers ? Activations::i16 : Activations::bf16));
  prepare(w, x.data() + first * w.depth, w.depth, 0, m, p);
  std::vector<float> y(m * w.panels() * kPanel, -1);
  product(w, p, m, 0, w.panels(), [&](int64_t panel, int64_t row, const float* from) {
    std::memcpy(y.data() + (row * w.panels() + panel) * kPanel, from, kPanel * sizeof(float));
  });
  return y;
}

static void check(WeightFormat format, int64_t rows, int64_t depth, int64_t group, bool minima) {
  const Case c = random_case(format, rows, depth, group, minima, static_cast<uint32_t>(rows + depth + group));
  const int64_t m = 37, columns = c.w.panels() * kPanel;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(m * depth);
  for (float& each : x) each = rounded(normal(random));
  const std::vector<float> y = multiply(c.w, x, 0, m);
  for (int64_t r = 0; r < m; ++r) {
    float largest = 0;
    for (int64_t k = 0; k < depth; ++k) largest = std::max(largest, std::fabs(x[r * depth + k]));
    for (int64_t n = 0; n < rows; ++n) {
      double want = 0, size = 0, weights = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const double one = static_cast<double>(x[r * depth + k]) * c.dense[n * depth + k];
        want += one, size += std::fabs(one), weights += std::fabs(c.dense[n * depth + k]);
      }
      const bool bf16s = format == WeightFormat::bf16, table = format == WeightFormat::nf4;
      const double bound = 1e-5 * size + (bf16s ? 0 : table ? size / 512 : largest / 65000 * weights);
      EXPECT(std::fabs(y[r * columns + n] - want) <= bound);
    }
  }
  for (const int64_t count : {1, 2, 4, 5, 15, 16, 17, 33}) {
    for (const int64_t first : {int64_t{0}, int64_t{3}, m - count}) {
      if (first + count > m) continue;
      const std::vector<float> part = multiply(c.w, x, first, count);
      EXPECT(std::equal(part.begin(), part.end(), y.begin() + first * columns));
    }
  }
}

int main() {
  if (Level::avx512vnni > supported_level()) return 77;
  for (const int64_t depth : {64, 70, 320, 576}) {
    check(WeightFormat::bf16, 40, depth, 0, false);
    check(WeightFormat::int8, 40, depth, 0, false);
    check(WeightFormat::int8, 24, depth, 32, false);
    check(WeightFormat::int8, 24, depth, 16, false);
    check(WeightFormat::int4, 72, depth, 32, false);
    check(WeightFormat::int4, 72, depth, 32, true);
    check(WeightFormat::nf4, 72, depth, 64, false);
  }
  std::printf("packed products with emulated tiles: %d failures\n", failures);
  return failures != 0;
}
