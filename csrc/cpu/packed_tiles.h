// The products of packed_product.h by AMX: tiles of 16 rows of 64 bytes. Included by packed_product.h.
//
// This file never ran on a machine with AMX: none was at hand. Its arithmetic is tested with the tile instructions in
// plain C++ (FINETUNE_EMULATED_TILES, csrc/tests/test_packed.cpp), the real ones are only compiled.
//
// A tile B is 16 words of a panel for its 16 rows of W, as they lie in memory; a tile A is up to 16 rows of x, 64 bytes
// of each; C += A · B. In bf16 (tdpbf16ps) that is 32 elements of K, and one row of x goes the same way as many, since
// the instruction rounds in another order than vdpbf16ps. For integers (tdpbsud: signed x, unsigned codes) sums are exact
// and so are those of vpdpbusd, which takes up to 4 rows; more take tiles of one block or, for blocks of 256, of 64
// elements. The compiler is not trusted with tiles: instructions are written out, and each may touch memory.
#pragma once

namespace finetune::FINETUNE_LEVEL {
namespace {

struct alignas(64) TileShapes {  // what ldtilecfg reads: palette 1, then bytes a row and rows of each tile
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t n, int64_t row_bytes) {
    rows[tile] = static_cast<uint8_t>(n);
    bytes[tile] = static_cast<uint16_t>(row_bytes);
  }
};
static_assert(sizeof(TileShapes) == 64);

#if defined(FINETUNE_EMULATED_TILES)
struct Tiles {  // the instructions' definitions (Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2)
  static inline thread_local TileShapes shapes;
  static inline thread_local uint32_t data[8][16][16];

  static void configure(const TileShapes& to) { shapes = to; }
  static void release() { shapes = {}; }
  template <int kTile>
  static void zero() {
    std::memset(data[kTile], 0, sizeof data[kTile]);
  }
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    zero<kTile>();
    for (int r = 0; r < shapes.rows[kTile]; ++r) {
      std::memcpy(data[kTile][r], static_cast<const char*>(from) + r * stride, shapes.bytes[kTile]);
    }
  }
  template <int kTile>
  static void save(void* to, int64_t stride) {
    for (int r = 0; r < shapes.rows[kTile]; ++r) {
      std::memcpy(static_cast<char*>(to) + r * stride, data[kTile][r], shapes.bytes[kTile]);
    }
  }
  template <int kC, int kA, int kB>
  static void multiply_bf16() {
    for (int m = 0; m < shapes.rows[kC]; ++m) {
      for (int n = 0; n < shapes.bytes[kC] / 4; ++n) {
        float even = 0, odd = 0, c;
        for (int k = 0; k < shapes.bytes[kA] / 4; ++k) {
          const uint32_t a = data[kA][m][k], b = data[kB][k][n];
          even += as_float(a << 16) * as_float(b << 16);
          odd += as_float(a & 0xffff0000u) * as_float(b & 0xffff0000u);
        }
        std::memcpy(&c, &data[kC][m][n], sizeof c);
        c += even + odd;
        std::memcpy(&data[kC][m][n], &c, sizeof c);
      }
    }
  }
  template <int kC, int kA, int kB>
  static void multiply_bytes() {
    for (int m = 0; m < shapes.rows[kC]; ++m) {
      for (int n = 0; n < shapes.bytes[kC] / 4; ++n) {
        for (int k = 0; k < shapes.bytes[kA]; ++k) {
          const auto a = static_cast<int8_t>(data[kA][m][k / 4] >> (8 * (k % 4)));
          const auto b = static_cast<uint8_t>(data[kB][k / 4][n] >> (8 * (k % 4)));
          data[kC][m][n] += static_cast<uint32_t>(a * b);
        }
      }
    }
  }
  static float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};
#else
struct Tiles {
  FINETUNE_INLINE static void configure(const TileShapes& to) { asm volatile("ldtilecfg %0" ::"m"(to) : "memory"); }
  FINETUNE_INLINE static void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int kTile>
  FINETUNE_INLINE static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile) : "memory");
  }
  template <int kTile>
  FINETUNE_INLINE static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  FINETUNE_INLINE static void save(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kC, int kA, int kB>
  FINETUNE_INLINE static void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB) : "memory");
  }
  template <int kC, int kA, int kB>
  FINETUNE_INLINE static void multiply_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB) : "memory");
  }
};
#endif

constexpr int64_t kTileRows16 = 16;  // of x

// Tiles 0 … 3 are C (a panel each, or its high and low bytes), 4 is A, 5 … 7 are B.
struct TileScope {
  TileShapes shapes;
  // `words` of a panel, and as many fours of bytes of x, meet in one instruction
  TileScope(int64_t rows, int64_t words) {
    for (int tile = 0; tile < 4; ++tile) shapes.set(tile, rows, 64);
    shapes.set(4, rows, 4 * words);
    for (int tile = 5; tile < 8; ++tile) shapes.set(tile, words, 64);
    Tiles::configure(shapes);
  }
  ~TileScope() { Tiles::release(); }
};

template <int kPanels, class Emit>
FINETUNE_INLINE void tile_rows_bf16(const PackedWeight& w, const Prepared& x, int64_t panel, int64_t row, int64_t rows,
                                    Emit&& emit) {
  const int64_t words = w.words();
  const auto* codes = static_cast<const uint32_t*>(w.codes) + panel * words * kPanel;
  const char* from = x.data + row * x.row;
  alignas(64) float y[kPanels][kTileRows16][kPanel];
  [&]<int... p>(std::integer_sequence<int, p...>) {
    (Tiles::zero<p>(), ...);
    for (int64_t i = 0; i < words; i += 16) {
      Tiles::load<4>(from + 4 * i, x.row);
      ((Tiles::load<5 + p % 3>(codes + (p * words + i) * kPanel, 64), Tiles::multiply_bf16<p, 4, 5 + p % 3>()), ...);
    }
    (Tiles::save<p>(y[p], 64), ...);
  }(std::make_integer_sequence<int, kPanels>());
  for (int p = 0; p < kPanels; ++p) {
    for (int64_t r = 0; r < rows; ++r) emit(panel + p, row + r, static_cast<const float*>(y[p][r]));
  }
}

// Rows of x in sixteens, whose panels come from the second cache again after the first sixteen.
template <class Emit>
void product_bf16_tiles(const PackedWeight& w, const Prepared& x, int64_t m, int64_t first, int64_t last, Emit&& emit) {
  const int64_t step = m <= kTileRows16 ? last - first : 4;
  for (int64_t from = first; from < last; from += step) {
    const int64_t end = from + step < last ? from + step : last;
    for (int64_t row = 0; row < m; row += kTileRows16) {
      const int64_t rows = m - row < kTileRows16 ? m - row : kTileRows16;
      const TileScope scope(rows, 16);
      int64_t panel = from;
      for (; m > 4 && panel + 4 <= end; panel += 4) tile_rows_bf16<4>(w, x, panel, row, rows, emit);
      for (; panel < end; ++panel) tile_rows_bf16<1>(w, x, panel, row, rows, emit);
    }
  }
}

// Up to 16 rows of x with one panel of int8 or int4: a block's sums leave the tiles and are scaled as tile_integers does.
template <WeightFormat kFormat, bool kMinima, class Emit>
FINETUNE_INLINE void tile_rows_integers(const PackedWeight& w, const Prepared& x, int64_t panel, int64_t row,
                                        int64_t rows, int64_t tile_words, Emit&& emit) {
  const Blocks blocks(w);
  const auto* codes = static_cast<const uint32_t*>(w.codes) + panel * w.words() * kPanel;
  const char* from = x.data + row * x.row;
  const char* offsets = from + kHigh + 2 * blocks.depth;
  alignas(64) float y[kTileRows16][kPanel] = {};
  alignas(64) int32_t high[kTileRows16][kPanel], low[kTileRows16][kPanel];
  alignas(64) uint32_t bytes[16 * kPanel];  // int4: a tile's codes, one in a byte
  for (int64_t b = 0; b < blocks.count; ++b) {
    Tiles::zero<0>();
    Tiles::zero<1>();
    const int64_t end = (b + 1) * blocks.block < blocks.depth ? (b + 1) * blocks.block : blocks.depth;
    for (int64_t k = b * blocks.block; k < end; k += 4 * tile_words) {
      const uint32_t* tile = codes + k / 4 * kPanel;
      if constexpr (kFormat == WeightFormat::int4) {
        for (int64_t i = 0; i < tile_words / 2; ++i) {
          const vu word = load_words(codes + (k / 8 + i) * kPanel);
          const vu even = word & 0x0f0f0f0fu, odd = (word >> 4) & 0x0f0f0f0fu;
          std::memcpy(bytes + 2 * i * kPanel, &even, sizeof even);
          std::memcpy(bytes + (2 * i + 1) * kPanel, &odd, sizeof odd);
        }
        tile = bytes;
      }
      Tiles::load<5>(tile, 64);
      Tiles::load<4>(from + kHigh + k, x.row);
      Tiles::multiply_bytes<0, 4, 5>();
      Tiles::load<4>(from + kHigh + blocks.depth + k, x.row);
      Tiles::multiply_bytes<1, 4, 5>();
    }
    Tiles::save<0>(high, 64);
    Tiles::save<1>(low, 64);
    const BlockScales scales = block_scales<kMinima>(w, panel * blocks.count + b);
    for (int64_t r = 0; r < rows; ++r) {
      const __m512i total =
          _mm512_add_epi32(_mm512_maskz_slli_epi32(0xffff, _mm512_load_si512(high[r]), 8), _mm512_load_si512(low[r]));
      const __m512i offset = bytes4(offsets + r * x.row + 4 * b);
      _mm512_store_ps(y[r], add_block<kMinima>(w, scales, total, offset, _mm512_load_ps(y[r])));
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    _mm512_store_ps(y[r], scaled(w, from + r * x.row, panel, _mm512_load_ps(y[r])));
    emit(panel, row + r, static_cast<const float*>(y[r]));
  }
}

template <class Emit>
void product_integer_tiles(const PackedWeight& w, const Prepared& x, int64_t m, int64_t first, int64_t last,
                           Emit&& emit) {
  const int64_t words = w.group && w.group < 64 ? w.group / 4 : 16;
  const auto with = [&]<WeightFormat kFormat, bool kMinima>() {
    for (int64_t from = first; from < last; from += 4) {
      const int64_t end = from + 4 < last ? from + 4 : last;
      for (int64_t row = 0; row < m; row += kTileRows16) {
        const int64_t rows = m - row < kTileRows16 ? m - row : kTileRows16;
        const TileScope scope(rows, words);
        for (int64_t panel = from; panel < end; ++panel) {
          tile_rows_integers<kFormat, kMinima>(w, x, panel, row, rows, words, emit);
        }
      }
    }
  };
  if (w.format == WeightFormat::int8) return with.template operator()<WeightFormat::int8, false>();
  if (w.minimum) return with.template operator()<WeightFormat::int4, true>();
  with.template operator()<WeightFormat::int4, false>();
}

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
