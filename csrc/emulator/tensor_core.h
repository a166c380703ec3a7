// Bytes and pairs within registers; ldmatrix and mma of a whole warp, after the fragment tables of the PTX ISA manual. The hardware sums in an order of
// its own; this one sums in double and rounds once.
#pragma once

#include "cuda.h"

namespace emulator {

struct LoadMatrix {
  const void* row;
  unsigned* r;
  int count;
  bool transposed;
};

inline void ldmatrix(unsigned* r, int count, const void* row, bool transposed, Site site) {
  require_shared(row, 16, "ldmatrix", site);
  LoadMatrix mine{row, r, count, transposed};
  touch(static_cast<int>(lane_index()) < 8 * count ? row : nullptr, 16, Access::read, site, "ldmatrix");
  collective(
      0xffffffffu,
      [](void* const* parts, uint32_t, Site) {
        const auto part = [&](int lane) { return static_cast<LoadMatrix*>(parts[lane]); };
        for (int lane = 0; lane < 32; ++lane) {
          for (int m = 0; m < part(0)->count; ++m) {
            unsigned value = 0;
            for (int half = 0; half < 2; ++half) {
              int i = lane / 4, j = 2 * (lane % 4) + half;
              if (part(0)->transposed) std::swap(i, j);
              uint16_t element;
              std::memcpy(&element, static_cast<const char*>(part(8 * m + i)->row) + 2 * j, 2);
              value |= static_cast<unsigned>(element) << (16 * half);
            }
            part(lane)->r[m] = value;
          }
        }
      },
      &mine, site, nullptr, true);
}

inline float half_of(unsigned r, int which, __nv_bfloat16) {
  return __bfloat162float({static_cast<uint16_t>(r >> (16 * which))});
}
inline float half_of(unsigned r, int which, __half) { return __half2float({static_cast<uint16_t>(r >> (16 * which))}); }

template <class T>
unsigned subtract(unsigned a, unsigned b) {
  unsigned r = 0;
  for (int i = 0; i < 2; ++i) {
    const float difference = half_of(a, i, T{}) - half_of(b, i, T{});
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      r |= static_cast<unsigned>(__float2bfloat16(difference).bits) << (16 * i);
    } else {
      r |= static_cast<unsigned>(__float2half(difference).bits) << (16 * i);
    }
  }
  return r;
}

inline unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> (4 * i), byte = (bytes >> (8 * (which & 7u))) & 0xffu;
    r |= (which & 8u ? (byte & 0x80u ? 0xffu : 0u) : byte) << (8 * i);
  }
  return r;
}

struct Mma {
  float* d;
  const unsigned* a;
  unsigned b[2];
};

template <class T>
void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Site site) {
  Mma mine{d, a, {b0, b1}};
  collective(
      0xffffffffu,
      [](void* const* parts, uint32_t, Site) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const auto* part = static_cast<Mma*>(parts[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i) {
            for (int half = 0; half < 2; ++half) {
              a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = half_of(part->a[i], half, T{});
            }
          }
          for (int i = 0; i < 2; ++i) {
            for (int half = 0; half < 2; ++half) b[2 * t + 8 * i + half][g] = half_of(part->b[i], half, T{});
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          float* out = static_cast<Mma*>(parts[lane])->d;
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            double sum = out[i];
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
            out[i] = static_cast<float>(sum);
          }
        }
      },
      &mine, site, "mma", true);
}

}  // namespace emulator
