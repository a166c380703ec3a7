// What attention's kernels share: which rows and keys a block has, tiles in shared memory, the copy pipeline.
#pragma once

#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/vector.cuh"
#include "finetune/attention.h"

namespace finetune::attention {

// __launch_bounds__(kThreads, 1) lets the compiler take the registers that it needs: 4 warps may have 255 each.
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr float kLog2e = 1.44269504088896f;

// --- which keys a query sees

// What may hide keys in addition to the causal rule, lengths and documents. Each has kernels of its own, from which the
// compiler removes what would serve the next ones.
enum Rules : int { kNone, kBounds /* a window, a softcap */, kMask /* and a mask */ };

__device__ __forceinline__ int64_t integer(const Integers& x, int64_t i) {
  return x.wide ? static_cast<const int64_t*>(x.data)[i] : static_cast<const int32_t*>(x.data)[i];
}
__device__ __forceinline__ int bounded(int64_t x, int low, int high) {
  return x < low ? low : (x < high ? static_cast<int>(x) : high);
}

struct Sequence {
  int batch, begin;  // its tokens start at `begin`
  int queries, keys, shift;
  bool causal;
  int window;  // 0: none

  // How many keys query i sees, counted from the first.
  __device__ int limit(int i) const {
    const int visible = i + shift + 1;
    return causal ? min(max(visible, 0), keys) : keys;
  }
  // How many keys lie before query i's window. It sees those from there to its limit, which may be none.
  __device__ int passed(int i) const {
    const int last = causal ? i + shift : keys - 1;
    return window ? max(last - window + 1, 0) : 0;
  }
  // The first query that sees key j, if one does.
  __device__ int since(int j) const { return causal ? max(j - shift, 0) : 0; }
  // The first query, and all after it, for which key j is before the window; 0x7fffffff or more than there are: none.
  __device__ int until(int j) const {
    if (!window) return 0x7fffffff;
    if (!causal) return j >= keys - window ? 0x7fffffff : 0;
    return max(j - shift >= queries - window ? queries : j - shift + window, 0);
  }
};

// A block's share of the work: `rows` tokens (queries or keys) of one head from token `first` of a sequence.
struct WorkTile {
  Sequence s;
  int head, first, rows, part;
};

// Tiles of `size` tokens for one head. A packed document n gets the tiles from begin / size + n on, so that a block
// finds its document by bisection: the host need not know where documents end. Some tiles get nothing.
__host__ __device__ inline int64_t tiles_of(const AttentionCudaShape& a, int64_t tokens, int64_t size) {
  return a.offsets.data ? tokens / size + a.documents : ceil_div(tokens, size);
}

// A sequence of the batch, without documents. rules: may there be a window?
__device__ __forceinline__ Sequence sequence(const AttentionCudaShape& a, int batch, bool rules) {
  const int queries = static_cast<int>(a.queries), keys = static_cast<int>(a.keys);
  const int real = a.lengths.data ? bounded(integer(a.lengths, batch), 0, keys) : keys;
  const int window = rules && a.window < keys ? static_cast<int>(a.window) : 0;  // a wider one hides nothing
  return {batch, 0, queries, real, keys - queries, a.causal, window};
}

// The place of block `index` where blocks are numbered (batch, head, tile, part); of_keys: tokens are keys.
__device__ __forceinline__ WorkTile work_tile(const AttentionCudaShape& a, int index, bool of_keys, int size, int parts,
                                              bool rules) {
  const int heads = static_cast<int>(of_keys ? a.kv_heads : a.heads);
  const int tokens = static_cast<int>(of_keys ? a.keys : a.queries);
  const int tiles = static_cast<int>(tiles_of(a, tokens, size));
  WorkTile work;
  work.part = index % parts;
  index /= parts;
  int tile = index % tiles;
  work.head = index / tiles % heads;
  work.s = sequence(a, index / tiles / heads, rules);
  int here = tokens;
  if (a.offsets.data) {
    int low = 0, high = static_cast<int>(a.documents);  // document `low` begins at or before the tile, `high` after it
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      (bounded(integer(a.offsets, middle), 0, tokens) / size + middle <= tile ? low : high) = middle;
    }
    work.s.begin = bounded(integer(a.offsets, low), 0, tokens);
    here = work.s.queries = work.s.keys = bounded(integer(a.offsets, low + 1), work.s.begin, tokens) - work.s.begin;
    work.s.shift = 0;
    tile -= work.s.begin / size + low;
  }
  work.first = bounded(int64_t{tile} * size, 0, 0x7fffffff);
  work.rows = min(max(here - work.first, 0), size);
  return work;
}

template <class T>
__device__ __forceinline__ T* at(const AttentionView& x, const Sequence& s, int token, int head) {
  const int64_t offset = s.batch * x.batch + (int64_t{s.begin} + token) * x.token + head * x.head;
  return static_cast<T*>(x.data) + offset;
}
__device__ __forceinline__ int64_t attention_rows(const AttentionSizes& a) { return a.batch * a.heads * a.queries; }
__device__ __forceinline__ int64_t row_index(const AttentionSizes& a, const Sequence& s, int head, int query) {
  return (s.batch * a.heads + head) * a.queries + s.begin + query;
}

// Row `query` of the mask.
__device__ __forceinline__ const unsigned char* mask_row(const AttentionSizes& a, const Sequence& s, int query) {
  return a.mask.data + s.batch * a.mask.batch + query * a.mask.query;
}

// May all of the view be moved 16 bytes at a time?
template <class T>
__device__ __forceinline__ bool in_chunks(const AttentionView& x, int64_t dim) {
  return (dim | x.batch | x.token | x.head) % kVector<T> == 0 && are_aligned(static_cast<const char*>(x.data));
}

// --- scores

// Which of a lane's scores of a tile a mask shows: bit r · columns + c is at(r, c). Where no lane of the warp has one the
// tile adds nothing, and where all have all it is like any other.
struct Shown {
  unsigned bits = 0, every = 0;

  template <int kRows, int kColumns, class Visible>
  __device__ __forceinline__ void find(Visible&& visible) {
    static_assert(kRows * kColumns <= 32);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const unsigned bit = 1u << (r * kColumns + c);
        every |= bit;
        if (visible(r, c)) bits |= bit;
      }
    }
  }
  __device__ bool any() const { return __any_sync(0xffffffffu, bits != 0); }
  __device__ bool all() const { return __all_sync(0xffffffffu, bits == every); }
};

// tanh to about 1 ulp: x + x³ P(x²) (Cephes tanhf) for |x| below 0.625, else ± (1 − 2e / (1 + e)) with e = e^(−2|x|).
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  const float size = fabsf(x), e = ptx::exp2(size * (-2 * kLog2e)), z = x * x;
  const float large = 1 - __fdividef(2 * e, 1 + e);
  float p = -5.70498872745e-3f;
  p = fmaf(p, z, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  return size < 0.625f ? fmaf(p * z, x, x) : copysignf(large, x);
}

// A score to base 2 from x = q·k: factor x, or with a softcap c log2(e) tanh(scale / c x).
struct Score {
  bool capped;
  float scale, factor;
  __device__ Score(const AttentionSizes& a, bool rules)
      : capped(rules && a.softcap > 0),
        scale(capped ? a.scale / a.softcap : a.scale),
        factor((capped ? a.softcap : a.scale) * kLog2e) {}
};

// --- tiles

// Rows of D elements in shared memory, as chunks of 16 bytes. Chunk c of row r lies at place c ^ r % 8 of its row (rows
// of four chunks: c ^ r / 2 % 4), so that eight rows' chunks c, what ldmatrix and a quarter of a warp read at once, are
// in different banks, as are the chunks of one row.
template <class T, int D>
struct Tile {
  static constexpr int kChunks = D / kVector<T>;
  T* data;

  __device__ T* write(int row, int chunk) const {
    const int mixed = chunk ^ (kChunks >= 8 ? row % 8 : row / 2 % 4);
    return data + (row * kChunks + mixed) * kVector<T>;
  }
  __device__ T* read(int row, int chunk) const { return write(row, chunk); }
  __device__ T* element(int row, int column) const { return read(row, column / kVector<T>) + column % kVector<T>; }
};

// Copies kRows rows, row_at(r) each, by all threads of the block; rows that do not exist(r), and columns past `dim`,
// become zeros; row_at(0) is an address within the tensor.
// By cp.async where `chunks` says that 16 bytes may move at once, else element by element.
// Unrolled, the addresses of its copies would take the registers that the sums need.
template <int kRows, class T, int D, class RowAt, class Exist>
__device__ __forceinline__ void load_rows(Tile<T, D> tile, RowAt&& row_at, Exist&& exist, int64_t dim, bool chunks) {
  constexpr int V = kVector<T>;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * tile.kChunks; i += kThreads) {
    const int row = i / tile.kChunks, chunk = i % tile.kChunks, column = chunk * V;
    if (chunks) {
      const bool inside = column < dim && exist(row);
      ptx::cp_async16(tile.write(row, chunk), inside ? row_at(row) + column : row_at(0), inside);
    } else {
      T* const to = tile.write(row, chunk);
#pragma unroll 1
      for (int j = 0; j < V; ++j) {
        to[j] = column + j < dim && exist(row) ? row_at(row)[column + j] : from_float<T>(0);
      }
    }
  }
}
// The same of rows that are `stride` elements apart.
template <int kRows, class T, int D>
__device__ __forceinline__ void load_tile(Tile<T, D> tile, const T* from, int64_t stride, int rows, int64_t dim,
                                          bool chunks) {
  load_rows<kRows>(
      tile, [=](int row) { return from + row * stride; }, [=](int row) { return row < rows; }, dim, chunks);
}

// One warp writes rows of a tile, which it alone has filled, to a view; the columns [begin, end) of them.
template <class T, int D>
__device__ __forceinline__ void store_rows(Tile<T, D> tile, int row, int count, T* to, int64_t stride, int begin,
                                           int64_t end, bool chunks) {
  constexpr int V = kVector<T>;
  __syncwarp();
  const int lane = threadIdx.x % 32, width = static_cast<int>(ceil_div(end - begin, V));
  for (int i = lane; i < count * width; i += 32) {
    const int r = i / width, column = begin + i % width * V;
    const auto v = load<T, V>(tile.read(row + r, column / V));
    T* const target = to + r * stride + column;
    if (chunks) {
      store(target, v);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (column + j < end) target[j] = v.at[j];
      }
    }
  }
}

// compute(n, stage) for n in [0, count), each after load(n, stage) into one of kStages buffers. With two of them the
// copies of step n + 1 are under way while step n is computed. One barrier a step then serves twice: all threads'
// copies have arrived, and nobody reads the buffer any more that the next copies overwrite.
template <int kStages, class Load, class Compute>
__device__ __forceinline__ void pipeline(int count, Load&& load, Compute&& compute) {
  const auto next = [&](int n) {
    if (n < count) load(n, n % kStages);
    ptx::cp_async_commit();
  };
  next(0);
  for (int n = 0; n < count; ++n) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (kStages == 2) next(n + 1);
    compute(n, n % kStages);
    if (kStages == 1) {
      __syncthreads();
      next(n + 1);
    }
  }
}

}  // namespace finetune::attention
