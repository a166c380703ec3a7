// Products with weights in few bits: y = x · Wᵀ + bias, W (rows, depth) = scale · code + minimum in groups along depth.
//
// Layout (Marlin's idea, Frantar et al. 2024, arXiv:2408.11743, with the weight as mma's left operand: 8 rows of x fill
// the right one, so that a single row wastes little). A panel is 32 rows of W, a tile 32 terms of a panel. A tile lies in
// memory as the fragments of its four mma m16n8k16: what a lane needs is 16 bytes of 4-bit codes, 2 × 16 of int8, 4 × 16
// of bf16, each part of a chunk of 32 lanes · 16 bytes that a warp takes in one instruction. Lane (g, t) = (lane / 4,
// lane % 4) has the rows g + 8 j, j = 0 … 3, of its panel, whose scales and minima follow each other too: 16 bytes of
// fp16 pairs a group of 32. One layout serves all numbers of rows of x.
//
// Codes become x's type without conversions: 0x4300 | q is 128 + q in bf16, 0x6400 | q is 1024 + q in fp16, for two
// codes at once. int4 keeps that offset o, which leaves with the minimum: over a group
//     Σ w x = s · Σ (o + q) x + (minimum − o s) · Σ x.
// int8 is (o + its low 7 bits) − (o + its sign bit), exactly. nf4 is looked up by byte permutations among its 16 values,
// rounded to x's type. Codes are exact and so are products: scales multiply the fp32 sums of a group, not the weights.
//
// A block's warps share the terms: class c of kClasses takes the tiles c, c + 4, …, and the classes' sums are added in
// that order. Every result goes through the same operations in the same order in all shapes below, so that its bits
// depend on its own rows of x and W, never on the other rows or their number.
//     few     1–8 rows of x: a block has 32 rows of W; the bytes of W are all that counts, each read once
//     some    9–32: 64 rows of W
//     many    squares of 64 × 64: each fragment of W is used for 8 mma; a kernel before this one makes Σ x. FLOPs a byte
//             of L2: 47 (int4), 42 (int8), 32 (bf16)
// Copies of x, codes and scales run ahead through cp.async in as many stages as fit. x in fp32 (and what has no tensor
// core product) goes through fused multiply-adds of the same layout, four rows a block.
// Of a tile, which is 1024 weights, with 8 rows of x:    int4       int8        bf16
//     bytes of codes + scales and minima (fp16, g 32)    512 + 128  1024 + 64    2048
//     16-byte loads of codes a lane, mma, ldmatrix        1, 6, 1    2, 4, 1    4, 4, 1     (int4: 2 mma are Σ x)
#include "quantized_linear_formats.cuh"

namespace finetune {
namespace {

// --- tensor cores

template <int kTokens_, int kAbreast_, int kBlocks_, int kBudget_>
struct Shape {
  static constexpr int kTokens = kTokens_, kAbreast = kAbreast_;  // warps of a class: they share x, each has a panel
  static constexpr int kThreads = 32 * kClasses * kAbreast, kRows = kPanel * kAbreast;
  static constexpr int kBlocks = kBlocks_, kBudget = kBudget_;  // of a multiprocessor; bytes of shared memory
  static constexpr bool kSumsGiven = kTokens > Args::some;
};
struct Few : Shape<Args::few, 1, 4, 48 * 1024> {};
struct Some : Shape<Args::some, 2, 1, 48 * 1024> {};
struct Many : Shape<Args::many, 2, 1, 96 * 1024> {};

// What a class has of one stage: x (tokens, 32 terms), its sums if they are given, the codes and the scales of its
// panels. Rows of x are four chunks of 16 bytes; chunk c of row r lies at place c ^ r / 2 % 4, so that the eight rows of
// an ldmatrix meet all banks.
template <class F, class S>
struct Stage {
  static constexpr int kSums = F::kMinimum && S::kSumsGiven ? S::kTokens * 4 : 0, kX = S::kTokens * kTile * 2 + kSums,
                       kCodes = F::kChunks * kChunk, kScales = F::kFold ? 256 : 0,
                       kBytes = kX + S::kAbreast * (kCodes + kScales);
  static constexpr int kFit = S::kBudget / (kClasses * kBytes), kStages = kFit < 8 ? kFit : 8;
  static_assert(kStages >= 2);
  unsigned char* memory;

  __device__ Stage(unsigned char* shared, int stage, int part) : memory(shared + (stage * kClasses + part) * kBytes) {}
  __device__ unsigned char* x(int row, int chunk) const {
    const int mixed = chunk ^ (row / 2 % 4);
    return memory + row * 64 + mixed * 16;
  }
  __device__ float* sums() const { return reinterpret_cast<float*>(memory + kX - kSums); }
  __device__ unsigned char* codes(int warp, int chunk) const { return memory + kX + warp * kCodes + chunk * kChunk; }
  __device__ unsigned char* scales(int warp) const { return memory + kX + S::kAbreast * kCodes + warp * kScales; }
};

// What a warp works on.
template <class S>
struct Place {
  int lane = threadIdx.x % 32, part = threadIdx.x / 32 % kClasses, abreast = threadIdx.x / 32 / kClasses;
  int64_t token0, panel;
  int tokens;
  __device__ explicit Place(const Args& a) {
    const int64_t across = ceil_div(a.m, S::kTokens);  // tokens fastest: neighbors read the same part of W
    token0 = blockIdx.x % across * S::kTokens;
    panel = blockIdx.x / across * S::kAbreast + abreast;
    tokens = static_cast<int>(min(a.m - token0, int64_t{S::kTokens}));
  }
};

// Where a thread's copies of tile 0 begin.
template <class F, class T, class S>
struct Source {
  const Args& a;
  const Place<S>& at;
  const T* x;
  const unsigned char* codes;
  bool aligned, inside;

  static constexpr int kCopiers = 32 * S::kAbreast, kTileBytes = F::kChunks * kChunk;
  __device__ int first() const { return at.abreast * 32 + at.lane; }  // of a class's chunks of x
  __device__ Source(const Args& a_, const Place<S>& at_) : a(a_), at(at_) {
    inside = at.panel < a.panels;
    aligned = a.stride % 8 == 0 && are_aligned(static_cast<const T*>(a.x));
    x = static_cast<const T*>(a.x) + (at.token0 + first() / 4) * a.stride + first() % 4 * 8;
    codes = static_cast<const unsigned char*>(a.codes) + (inside ? at.panel * a.tiles * kTileBytes : 0) + at.lane * 16;
  }

  // 16 bytes of x by cp.async where they may move at once, zeros behind the end of tokens and depth.
  __device__ __forceinline__ void load_x(const Stage<F, S>& to, int64_t tile) const {
    const int terms = static_cast<int>(min(a.depth - tile * kTile, int64_t{kTile})) - first() % 4 * 8;
    const T* from = x + tile * kTile;
#pragma unroll 1  // unrolled, the addresses would take the registers that the sums need
    for (int i = first(); i < S::kTokens * 4; i += kCopiers, from += kCopiers / 4 * a.stride) {
      const int row = i / 4, chunk = i % 4, left = row < at.tokens ? terms : 0;
      if (left <= 0) {
        ptx::store_shared16(to.x(row, chunk), {});
      } else if (aligned && left >= 8) {
        ptx::cp_async16(to.x(row, chunk), from, true);
      } else {
        T* const element = reinterpret_cast<T*>(to.x(row, chunk));
#pragma unroll 1
        for (int j = 0; j < 8; ++j) element[j] = j < left ? from[j] : from_float<T>(0);
      }
    }
  }

  // The codes and scales of the warp's panel, zeros behind the last one.
  __device__ __forceinline__ void load_weight(const Stage<F, S>& to, int64_t tile) const {
    const unsigned char* const from = codes + (inside ? tile * kTileBytes : 0);
#pragma unroll
    for (int c = 0; c < F::kChunks; ++c) {
      ptx::cp_async16(to.codes(at.abreast, c) + at.lane * 16, from + c * kChunk, inside);
    }
    if constexpr (F::kFold != 0) {
      if (at.lane * 16 < group_bytes(a) * (kTile / F::kFold)) {
        const auto* const scales = static_cast<const unsigned char*>(a.scale) + at.lane * 16;
        const int64_t offset = inside ? scale_offset<F>(a, at.panel, tile) : 0;
        ptx::cp_async16(to.scales(at.abreast) + at.lane * 16, scales + offset, inside);
      }
    }
  }

  // The sums of x that sum_x made.
  __device__ __forceinline__ void load_sums(const Stage<F, S>& to, int64_t tile) const {
    if (at.abreast == 0 && at.lane < S::kTokens / 4) {
      const int64_t token = at.token0 + 4 * at.lane, padded = ceil_div(a.m, 8) * 8;
      const bool inside = token < padded;
      ptx::cp_async16(to.sums() + 4 * at.lane, a.sums + (inside ? tile * padded + token : 0), inside);
    }
  }
};

// A lane's sums: d[i][n][2 h + e] is of row g + 8 (2 i + h) of the panel and token 8 n + 2 t + e.
template <class S>
struct Sums {
  float d[2][S::kTokens / 8][4];
};

// Σ x over the 32 terms of both steps' right operands, as mma's sums have it: of tokens 2 t and 2 t + 1 in every row.
template <class T>
__device__ __forceinline__ void sum_of_x(float (&sum)[4], const unsigned (&right)[4]) {
  const unsigned ones[4] = {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>};
  ptx::mma_16x8x16<T>(sum, ones, right[0], right[1]);
  ptx::mma_16x8x16<T>(sum, ones, right[2], right[3]);
}

// The same of all of x, for many rows: a.sums (tiles, tokens padded to eights). A warp makes one tile's of 8 tokens, by
// the same operations.
template <class T>
__global__ void __launch_bounds__(Few::kThreads) sum_x(Args a) {
  constexpr int kWords = kClasses * Stage<Int4, Few>::kBytes / 16;
  SHARED(uint4, memory, [kWords]);
  const Place<Few> at(a);
  const int64_t tile = at.panel * kClasses + at.part;
  if (tile >= a.tiles) return;
  const Stage<Int4, Few> stage(reinterpret_cast<unsigned char*>(&memory[0]), 0, at.part);
  Source<Int4, T, Few>(a, at).load_x(stage, tile);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  unsigned right[4];
  ptx::ldmatrix_x4(right, stage.x(at.lane % 8, at.lane / 8));
  float sum[4] = {};
  sum_of_x<T>(sum, right);
  const int64_t to = tile * (ceil_div(a.m, 8) * 8) + at.token0 + 2 * at.lane;
  if (at.lane < 4) store(a.sums + to, Vector<float, 2>{{sum[0], sum[1]}});
}

// The sum of a group joins the others.
template <class F>
__device__ __forceinline__ void fold(float (&sum)[4], const float (&group)[4], const Scales& s, int i,
                                     const float (&of_x)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    sum[j] = fmaf(s.scale[2 * i + j / 2], group[j], sum[j]);
    if (F::kMinimum) sum[j] = fmaf(s.minimum[2 * i + j / 2], of_x[j % 2], sum[j]);
  }
}

template <class F, class T, class S>
__device__ __forceinline__ void multiply_tile(const Args& a, const Place<S>& at, const Stage<F, S>& stage,
                                              Sums<S>& sums) {
  unsigned words[4 * F::kChunks];
#pragma unroll
  for (int c = 0; c < F::kChunks; ++c) {
    const auto v = load<unsigned, 4>(reinterpret_cast<const unsigned*>(stage.codes(at.abreast, c)) + 4 * at.lane);
#pragma unroll
    for (int j = 0; j < 4; ++j) words[4 * c + j] = v.at[j];
  }
  unsigned left[2][2][4];  // of both mma's rows the steps
#pragma unroll
  for (int i = 0; i < 4; ++i) F::template fragment<T>(left[i / 2][i % 2], words, i / 2, i % 2);
  Scales scales[F::kFold == 16 ? 2 : 1];
  if constexpr (F::kFold != 0) {
#pragma unroll
    for (int q = 0; q < kTile / F::kFold; ++q) {
      scales[q] = load_scales<F::kMinimum>(a, stage.scales(at.abreast) + q * group_bytes(a), at.lane / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) scales[q].minimum[j] = fmaf(-kOffset<T>, scales[q].scale[j], scales[q].minimum[j]);
    }
  }
#pragma unroll
  for (int n = 0; n < S::kTokens / 8; ++n) {
    unsigned right[4];  // both registers of step 0, then of step 1
    ptx::ldmatrix_x4(right, stage.x(8 * n + at.lane % 8, at.lane / 8));
    float of_x[4] = {};  // Σ x of the tile
    if constexpr (F::kMinimum && S::kSumsGiven) {
      const auto v = load<float, 2>(stage.sums() + 8 * n + at.lane % 4 * 2);
      of_x[0] = v.at[0], of_x[1] = v.at[1];
    } else if constexpr (F::kMinimum) {
      sum_of_x<T>(of_x, right);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float (&sum)[4] = sums.d[i][n];
      float first[4] = {}, second[4] = {};  // of a group
      if constexpr (F::kFold == 0) {
        ptx::mma_16x8x16<T>(sum, left[i][0], right[0], right[1]);
        ptx::mma_16x8x16<T>(sum, left[i][1], right[2], right[3]);
      } else if constexpr (F::kFold == 16) {
        ptx::mma_16x8x16<T>(first, left[i][0], right[0], right[1]);
        ptx::mma_16x8x16<T>(second, left[i][1], right[2], right[3]);
        fold<F>(sum, first, scales[0], i, of_x);
        fold<F>(sum, second, scales[1], i, of_x);
      } else {
        ptx::mma_16x8x16<T>(first, left[i][0], right[0], right[1]);
        ptx::mma_16x8x16<T>(first, left[i][1], right[2], right[3]);
        fold<F>(sum, first, scales[0], i, of_x);
      }
    }
  }
}

// The classes' sums, added in order through shared memory, then to y.
template <class F, class T, class S>
__device__ __forceinline__ void join_and_store(const Args& a, const Place<S>& at, const Sums<S>& sums,
                                               unsigned char* memory) {
  const int pitch = S::kRows + 4;  // of a token: lanes' columns are 8 words apart then
  float* const total = reinterpret_cast<float*>(memory);
#pragma unroll 1
  for (int part = 0; part < kClasses; ++part) {
    __syncthreads();  // also: the last tiles are read
    if (part != at.part) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < S::kTokens / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = at.abreast * kPanel + 16 * i + 8 * (j / 2) + at.lane / 4;
          float& to = total[(8 * n + at.lane % 4 * 2 + j % 2) * pitch + row];
          to = part == 0 ? sums.d[i][n][j] : to + sums.d[i][n][j];
        }
      }
    }
  }
  __syncthreads();
  constexpr int V = 4;
  T* const y = static_cast<T*>(a.y);
  const bool whole = a.rows % V == 0 && are_aligned(y);
  for (int i = threadIdx.x; i < at.tokens * (S::kRows / V); i += S::kThreads) {
    const int token = i / (S::kRows / V), column = i % (S::kRows / V) * V;
    const int64_t row = (at.panel - at.abreast) * kPanel + column;
    if (row >= a.rows) continue;
    const Ends<F, T, V> ends(a, row);
    const auto v = load<float, V>(total + token * pitch + column);
    T* const to = y + (at.token0 + token) * a.rows + row;
    if (whole) {
      Vector<T, V> out;
#pragma unroll
      for (int j = 0; j < V; ++j) out.at[j] = ends.finish(j, v.at[j]);
      store(to, out);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (row + j < a.rows) to[j] = ends.finish(j, v.at[j]);
      }
    }
  }
}

template <class F, class T, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) multiply(Args a) {
  constexpr int kStages = Stage<F, S>::kStages;
  DYN_SHARED(unsigned char, memory);  // (kStages, kClasses) stages; at the end the sums
  const Place<S> at(a);
  const Source<F, T, S> source(a, at);
  const int steps = static_cast<int>(ceil_div(a.tiles, kClasses));
  const auto begin = [&](int step, int stage) {
    const int64_t tile = int64_t{step} * kClasses + at.part;
    if (tile < a.tiles) {
      const Stage<F, S> to(memory, stage, at.part);
      source.load_x(to, tile);
      source.load_weight(to, tile);
      if constexpr (Stage<F, S>::kSums != 0) source.load_sums(to, tile);
    }
    ptx::cp_async_commit();  // even if it is empty: the wait counts groups
  };
  Sums<S> sums{};
  for (int i = 0; i < kStages - 1; ++i) begin(i, i);
  int here = 0, ahead = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    // Serves twice: the other threads' copies of this stage have arrived, and nobody reads the stage that is next filled.
    if constexpr (S::kAbreast == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
    begin(step + kStages - 1, ahead);
    if (int64_t{step} * kClasses + at.part < a.tiles) {
      multiply_tile<F, T>(a, at, Stage<F, S>(memory, here, at.part), sums);
    }
    here = here == kStages - 1 ? 0 : here + 1;
    ahead = ahead == kStages - 1 ? 0 : ahead + 1;
  }
  join_and_store<F, T>(a, at, sums, memory);
}

// --- fused multiply-adds: x in fp32, weights in fp32, bf16 weights with x in fp16

constexpr int kFmaThreads = 32 * kClasses, kFmaTokens = 4;

template <class F, class T>
__global__ void __launch_bounds__(kFmaThreads) multiply_by_fma(Args a) {
  SHARED(float, total, [kFmaTokens][kPanel]);
  SHARED(float, table, [16]);
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t across = ceil_div(a.m, kFmaTokens);
  const int64_t token0 = blockIdx.x % across * kFmaTokens, panel = blockIdx.x / across;
  const int tokens = static_cast<int>(min(a.m - token0, int64_t{kFmaTokens}));
  if constexpr (std::is_same_v<F, Nf4>) {
#pragma unroll
    for (int code = 0; code < 16; ++code) {
      if (threadIdx.x == code) table[code] = nf4(code);
    }
    __syncthreads();
  }
  float sums[kFmaTokens][4] = {};  // of row g + 8 j
#pragma unroll 1
  for (int64_t tile = part; tile < a.tiles; tile += kClasses) {
    unsigned words[4 * F::kChunks];
#pragma unroll
    for (int c = 0; c < F::kChunks; ++c) {
      const int64_t chunk = (panel * a.tiles + tile) * F::kChunks + c;
      const auto v = load<unsigned, 4>(static_cast<const unsigned*>(a.codes) + chunk * (kChunk / 4) + 4 * lane);
#pragma unroll
      for (int j = 0; j < 4; ++j) words[4 * c + j] = v.at[j];
    }
    Scales scales[F::kFold == 16 ? 2 : 1];
    if constexpr (F::kFold != 0) {
      const auto* const first = static_cast<const unsigned char*>(a.scale) + scale_offset<F>(a, panel, tile);
#pragma unroll
      for (int q = 0; q < kTile / F::kFold; ++q) scales[q] = load_scales<F::kMinimum>(a, first + q * group_bytes(a), g);
    }
#pragma unroll
    for (int at = 0; at < 8; ++at) {
      const int step = at / 4, upper = at / 2 % 2, e = at % 2;
      const int64_t term = tile * kTile + 16 * step + 8 * upper + 2 * t + e;
      float w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        w[j] = F::value(words, table, j / 2, step, j % 2 + 2 * upper, e);
        if constexpr (F::kFold != 0) {
          const Scales& s = scales[F::kFold == 16 ? step : 0];
          if (F::kMinimum && !a.minima) w[j] -= 8;
          w[j] = __fmul_rn(w[j], s.scale[j]);  // not fused: the values that dequantize() gives
          if (F::kMinimum && a.minima) w[j] = __fadd_rn(w[j], s.minimum[j]);
        }
      }
#pragma unroll
      for (int token = 0; token < kFmaTokens; ++token) {
        const bool inside = token < tokens && term < a.depth;
        const float x = inside ? to_float(static_cast<const T*>(a.x)[(token0 + token) * a.stride + term]) : 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[token][j] = fmaf(w[j], x, sums[token][j]);
      }
    }
  }
#pragma unroll
  for (int token = 0; token < kFmaTokens; ++token) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums[token][j] += __shfl_xor_sync(0xffffffffu, sums[token][j], 1);
      sums[token][j] += __shfl_xor_sync(0xffffffffu, sums[token][j], 2);
    }
  }
#pragma unroll 1
  for (int each = 0; each < kClasses; ++each) {
    if (each == part && t == 0) {
#pragma unroll
      for (int token = 0; token < kFmaTokens; ++token) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& to = total[token][g + 8 * j];
          to = each == 0 ? sums[token][j] : to + sums[token][j];
        }
      }
    }
    __syncthreads();
  }
  const int token = threadIdx.x / kPanel;
  const int64_t row = panel * kPanel + threadIdx.x % kPanel;
  if (token < tokens && row < a.rows) {
    const float sum = total[token][threadIdx.x % kPanel];
    static_cast<T*>(a.y)[(token0 + token) * a.rows + row] = Ends<F, T, 1>(a, row).finish(0, sum);
  }
}

// --- launches

template <class F, class T>
Status launch_fma(const Args& a, void* stream) {
  const int64_t blocks = a.panels * ceil_div(a.m, kFmaTokens);
  return launch(multiply_by_fma<F, T>, dim3(static_cast<unsigned>(blocks)), dim3(kFmaThreads), 0, stream, a);
}

template <class F, class T, class S>
Status launch_mma(const Args& a, void* stream) {
  constexpr int kStages = kClasses * Stage<F, S>::kStages * Stage<F, S>::kBytes,
                kSums = S::kTokens * (S::kRows + 4) * 4;
  const int64_t blocks = ceil_div(a.panels, S::kAbreast) * ceil_div(a.m, S::kTokens);
  return launch(multiply<F, T, S>, dim3(static_cast<unsigned>(blocks)), dim3(S::kThreads), max(kStages, kSums), stream,
                a);
}

template <class F, class T>
Status launch_rows(const Args& a, void* stream) {
  if (a.m <= Few::kTokens) return launch_mma<F, T, Few>(a, stream);
  if (a.m <= Some::kTokens) return launch_mma<F, T, Some>(a, stream);
  if (F::kMinimum && a.tiles) {
    const int64_t blocks = ceil_div(a.m, Few::kTokens) * ceil_div(a.tiles, kClasses);
    const Status summed = launch(sum_x<T>, dim3(static_cast<unsigned>(blocks)), dim3(Few::kThreads), 0, stream, a);
    if (summed != Status::ok) return summed;
  }
  return launch_mma<F, T, Many>(a, stream);
}

template <class F>
Status launch_coded(const Args& a, void* stream) {
  if (a.dtype == DType::bf16) return launch_rows<F, bf16>(a, stream);
  if (a.dtype == DType::f16) return launch_rows<F, f16>(a, stream);
  return a.dtype == DType::f32 ? launch_fma<F, float>(a, stream) : Status::unsupported;
}

}  // namespace

template <>
Status launch_cuda(const QuantizedLinearCuda& a, void* stream) {
  switch (a.format) {
    case WeightFormat::fp32:
      return for_dtype(a.dtype, [&](auto t) { return launch_fma<Fp32, decltype(t)>(a, stream); });
    case WeightFormat::bf16:
      if (a.dtype == DType::bf16) return launch_rows<Bf16, bf16>(a, stream);
      if (a.dtype == DType::f16) return launch_fma<Bf16, f16>(a, stream);
      return a.dtype == DType::f32 ? launch_fma<Bf16, float>(a, stream) : Status::unsupported;
    case WeightFormat::int8:
      if (a.group == 0) return launch_coded<Int8<0>>(a, stream);
      if (a.group == 16) return launch_coded<Int8<16>>(a, stream);
      return a.group == 32 ? launch_coded<Int8<32>>(a, stream) : Status::unsupported;
    case WeightFormat::int4:
      return a.group == 32 ? launch_coded<Int4>(a, stream) : Status::unsupported;
    case WeightFormat::nf4:
      return a.group == 64 ? launch_coded<Nf4>(a, stream) : Status::unsupported;
  }
  return Status::unsupported;
}

}  // namespace finetune
