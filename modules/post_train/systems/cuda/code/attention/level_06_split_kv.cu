// Split-KV (flash-decoding): several blocks share the keys, and a second kernel joins their results by the lse.
//
// With few queries, as in decoding, level 5 has one block a head, and most of a GPU is idle. Here a block takes a split
// of the keys and leaves o_i = acc / l and lse_i = m + log2 l; o = Σ 2^(lse_i − lse) · o_i, lse = log2 Σ 2^lse_i. That
// costs 2 · splits · H · M · (D + 1) floats of traffic, little where M is 1, and buys `splits` times the blocks.
// (Dao, Haziza, Massa & Sizov 2023, "Flash-Decoding for long-context inference".)
#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int HEAD_DIM = 64, BLOCK_M = 64, BLOCK_N = 64, BLOCK_SIZE = BLOCK_M / 16 * 32, MAX_SPLITS = 8;
constexpr int kWide = 8, kChunks = HEAD_DIM / kWide;  // elements of 16 bytes; those of a row
using Chunk = Vector<bf16, kWide>;
struct Shape {
  int64_t heads, q_len, k_len, dim, splits, split_size;  // keys of a split
};

__device__ __forceinline__ int place(int row, int chunk) { return row * kChunks + (chunk ^ row % 8); }

// Rows [first, first + 64) of a (rows, dim) matrix, padded with 0 to 64 columns.
__device__ __forceinline__ void fetch(Chunk* tile, const bf16* x, int64_t first, int64_t rows, int64_t dim) {
  const bool aligned = are_aligned(x) && dim % kWide == 0;
  for (int i = threadIdx.x; i < BLOCK_N * kChunks; i += BLOCK_SIZE) {
    const int row = i / kChunks, column = i % kChunks * kWide;
    const bool inside = first + row < rows;
    const bf16* from = x + (first + row) * dim + column;
    Chunk v;
    for (int j = 0; j < kWide && !aligned; ++j) v.at[j] = inside && column + j < dim ? from[j] : bf16{};
    if (aligned) v = inside && column < dim ? load<bf16, kWide>(from) : Chunk{};
    tile[place(row, i % kChunks)] = v;
  }
}

// 16 queries of a warp. Of an accumulator a lane has rows lane / 4 and lane / 4 + 8: [j][2 h] and [j][2 h + 1] are the
// elements of row lane / 4 + 8 h in columns 8 j + 2 (lane % 4) and + 1.
struct Rows {
  unsigned q[HEAD_DIM / 16][4];
  float acc[HEAD_DIM / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
};

// One tile: S = Q·Kᵀ, m and l, O += P·V. `keys` of its keys exist.
__device__ __forceinline__ void take_tile(Rows& r, const Chunk* ks, const Chunk* vs, int64_t keys, float scale) {
  const int lane = threadIdx.x % 32;
  float p[BLOCK_N / 8][4] = {};  // scores, then probabilities
#pragma unroll
  for (int j = 0; j < BLOCK_N / 16; ++j) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; ++i) {
      unsigned b[4];
      ptx::ldmatrix_x4(b, ks + place(16 * j + lane % 8 + lane / 16 * 8, 2 * i + lane / 8 % 2));
      ptx::mma_16x8x16<bf16>(p[2 * j], r.q[i], b[0], b[1]);
      ptx::mma_16x8x16<bf16>(p[2 * j + 1], r.q[i], b[2], b[3]);
    }
  }
#pragma unroll
  for (int e = 0; e < BLOCK_N / 2; ++e) {
    float& score = p[e / 4][e % 4];
    score = e / 4 * 8 + lane % 4 * 2 + e % 2 < keys ? score * scale : -INFINITY;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float m_new = r.m[h];
#pragma unroll
    for (int e = 0; e < BLOCK_N / 4; ++e) m_new = fmaxf(m_new, p[e / 2][2 * h + e % 2]);
    for (int bits = 1; bits < 4; bits *= 2) m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffffu, m_new, bits));
    const float rescale = ptx::exp2(r.m[h] - m_new);
    r.m[h] = m_new;
    r.l[h] *= rescale;
#pragma unroll
    for (int e = 0; e < BLOCK_N / 4; ++e)
      r.l[h] += p[e / 2][2 * h + e % 2] = ptx::exp2(p[e / 2][2 * h + e % 2] - m_new);
#pragma unroll
    for (int e = 0; e < HEAD_DIM / 4; ++e) r.acc[e / 2][2 * h + e % 2] *= rescale;
  }
#pragma unroll
  for (int j = 0; j < BLOCK_N / 16; ++j) {
    unsigned a[4], b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = ptx::pack<bf16>(p[2 * j + i / 2][i % 2 * 2], p[2 * j + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; ++i) {
      ptx::ldmatrix_x4_trans(b, vs + place(16 * j + lane % 16, 2 * i + lane / 16));
      ptx::mma_16x8x16<bf16>(r.acc[2 * i], a, b[0], b[1]);
      ptx::mma_16x8x16<bf16>(r.acc[2 * i + 1], a, b[2], b[3]);
    }
  }
}

// parts (splits, H·M, HEAD_DIM): o_i;  lses (splits, H·M).
__global__ void __launch_bounds__(BLOCK_SIZE)
    attend(const bf16* q, const bf16* k, const bf16* v, float* parts, float* lses, Shape s) {
  SHARED(Chunk, qs, [BLOCK_M * kChunks]);
  SHARED(Chunk, ks, [BLOCK_N * kChunks]);
  SHARED(Chunk, vs, [BLOCK_N * kChunks]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t blocks = ceil_div(s.q_len, BLOCK_M), head = blockIdx.x / blocks, top = blockIdx.x % blocks * BLOCK_M;
  const int64_t begin = blockIdx.y * s.split_size, end = min(begin + s.split_size, s.k_len);
  k += head * s.k_len * s.dim, v += head * s.k_len * s.dim;
  const float scale = rsqrtf(static_cast<float>(s.dim)) * 1.44269504f;  // 2^x is cheaper than e^x
  Rows r;
  fetch(qs, q + head * s.q_len * s.dim, top, s.q_len, s.dim);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 16; ++i) {
    ptx::ldmatrix_x4(r.q[i], qs + place(16 * warp + lane % 16, 2 * i + lane / 16));
  }
  for (int64_t first = begin; first < end; first += BLOCK_N) {
    fetch(ks, k, first, s.k_len, s.dim);
    fetch(vs, v, first, s.k_len, s.dim);
    __syncthreads();
    take_tile(r, ks, vs, end - first, scale);
    __syncthreads();  // before the next tile overwrites this one
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int bits = 1; bits < 4; bits *= 2) r.l[h] += __shfl_xor_sync(0xffffffffu, r.l[h], bits);
    const int64_t query = top + 16 * warp + lane / 4 + 8 * h, row = (blockIdx.y * s.heads + head) * s.q_len + query;
    if (query >= s.q_len) continue;
    float* to = parts + row * HEAD_DIM + lane % 4 * 2;
    if (lane % 4 == 0) lses[row] = r.m[h] + log2f(r.l[h]);
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; ++j)
      store(to + 8 * j, Vector<float, 2>{{r.acc[j][2 * h] / r.l[h], r.acc[j][2 * h + 1] / r.l[h]}});
  }
}

// A block joins BLOCK_M rows.
__global__ void __launch_bounds__(HEAD_DIM) join(const float* parts, const float* lses, float* out, Shape s) {
  const int64_t rows = s.heads * s.q_len, first = static_cast<int64_t>(blockIdx.x) * BLOCK_M;
  for (int64_t row = first; row < min(first + BLOCK_M, rows); ++row) {
    float m = -INFINITY, l = 0.0f, o = 0.0f;
    for (int64_t i = 0; i < s.splits; ++i) m = fmaxf(m, lses[i * rows + row]);
    for (int64_t i = 0; i < s.splits; ++i) {
      const float weight = ptx::exp2(lses[i * rows + row] - m);
      l += weight, o += weight * parts[(i * rows + row) * HEAD_DIM + threadIdx.x];
    }
    if (threadIdx.x < s.dim) out[row * s.dim + threadIdx.x] = o / l;
  }
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const void* q, const void* k, const void* v, float* out, float* scratch, int64_t heads,
                            int64_t q_len, int64_t k_len, int64_t dim, void* stream) {
  using namespace finetune;
  if (dim > HEAD_DIM) return static_cast<int>(Status::unsupported);
  const int64_t size = ceil_div(ceil_div(k_len, BLOCK_N), MAX_SPLITS) * BLOCK_N, splits = ceil_div(k_len, size);
  const Shape s{heads, q_len, k_len, dim, splits, size};
  float* lses = scratch + splits * heads * q_len * HEAD_DIM;
  const dim3 grid(static_cast<unsigned>(heads * ceil_div(q_len, BLOCK_M)), static_cast<unsigned>(splits));
  Status status = launch(attend, grid, dim3(BLOCK_SIZE), 0, stream, static_cast<const bf16*>(q),
                         static_cast<const bf16*>(k), static_cast<const bf16*>(v), scratch, lses, s);
  const dim3 joins(static_cast<unsigned>(ceil_div(heads * q_len, BLOCK_M)));
  if (status == Status::ok) status = launch(join, joins, dim3(HEAD_DIM), 0, stream, scratch, lses, out, s);
  return static_cast<int>(status);
}
