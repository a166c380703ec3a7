// The next tile is copied while the present one is multiplied: cp.async, two stages of k and v.
//
// cp.async moves 16 bytes from global to shared memory past the registers and returns at once. A group is committed for
// each tile; waiting until at most one group is under way means that the older tile has arrived, and the barrier makes
// it visible to all. Traffic is as before: what this buys is time, which an emulator cannot show. It costs a second
// pair of tiles in shared memory, 40 KB in all.
#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int HEAD_DIM = 64, BLOCK_M = 64, BLOCK_N = 64, BLOCK_SIZE = BLOCK_M / 16 * 32;
constexpr int kWide = 8, kChunks = HEAD_DIM / kWide;  // elements of 16 bytes; those of a row
using Chunk = Vector<bf16, kWide>;

struct Shape {
  int64_t heads, q_len, k_len, dim;
};

__device__ __forceinline__ int place(int row, int chunk) { return row * kChunks + (chunk ^ row % 8); }

// Rows [first, first + 64) of a (rows, dim) matrix, padded with 0 to 64 columns. Aligned rows are still on their way
// when this returns.
__device__ __forceinline__ void fetch(Chunk* tile, const bf16* x, int64_t first, int64_t rows, int64_t dim) {
  const bool aligned = are_aligned(x) && dim % kWide == 0;
  for (int i = threadIdx.x; i < BLOCK_N * kChunks; i += BLOCK_SIZE) {
    const int row = i / kChunks, column = i % kChunks * kWide;
    const bf16* from = x + (first + row) * dim + column;
    Chunk& to = tile[place(row, i % kChunks)];
    const bool inside = first + row < rows;
    if (aligned) ptx::cp_async16(&to, inside && column < dim ? from : x, inside && column < dim);
    for (int j = 0; j < kWide && !aligned; ++j) to.at[j] = inside && column + j < dim ? from[j] : bf16{};
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

__global__ void __launch_bounds__(BLOCK_SIZE)
    attention(const bf16* q, const bf16* k, const bf16* v, float* out, Shape s) {
  SHARED(Chunk, qs, [BLOCK_M * kChunks]);
  SHARED(Chunk, ks, [2][BLOCK_N * kChunks]);
  SHARED(Chunk, vs, [2][BLOCK_N * kChunks]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t blocks = ceil_div(s.q_len, BLOCK_M), head = blockIdx.x / blocks, top = blockIdx.x % blocks * BLOCK_M;
  k += head * s.k_len * s.dim, v += head * s.k_len * s.dim;
  const float scale = rsqrtf(static_cast<float>(s.dim)) * 1.44269504f;  // 2^x is cheaper than e^x
  const auto fetch_tile = [&](int64_t first) {
    const int stage = first / BLOCK_N % 2;
    if (first < s.k_len) fetch(ks[stage], k, first, s.k_len, s.dim), fetch(vs[stage], v, first, s.k_len, s.dim);
    ptx::cp_async_commit();  // empty behind the last tile, so that the count below holds there too
  };
  Rows r;
  fetch(qs, q + head * s.q_len * s.dim, top, s.q_len, s.dim);  // in the first tile's group
  fetch_tile(0);
  for (int64_t first = 0; first < s.k_len; first += BLOCK_N) {
    fetch_tile(first + BLOCK_N);
    ptx::cp_async_wait<1>();
    __syncthreads();
    if (first == 0) {
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 16; ++i) {
        ptx::ldmatrix_x4(r.q[i], qs + place(16 * warp + lane % 16, 2 * i + lane / 16));
      }
    }
    const int stage = first / BLOCK_N % 2;
    take_tile(r, ks[stage], vs[stage], s.k_len - first, scale);
    __syncthreads();  // before this stage is filled again
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int bits = 1; bits < 4; bits *= 2) r.l[h] += __shfl_xor_sync(0xffffffffu, r.l[h], bits);
    const int64_t row = top + 16 * warp + lane / 4 + 8 * h;
    float* to = out + (head * s.q_len + row) * s.dim + lane % 4 * 2;
    const bool even = s.dim % 2 == 0 && reinterpret_cast<uintptr_t>(out) % 8 == 0;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; ++j) {
      const Vector<float, 2> o{{r.acc[j][2 * h] / r.l[h], r.acc[j][2 * h + 1] / r.l[h]}};
      const int64_t left = row < s.q_len ? s.dim - (8 * j + lane % 4 * 2) : 0;
      if (even && left >= 2) {
        store(to + 8 * j, o);
      } else {
        for (int i = 0; i < 2 && i < left; ++i) to[8 * j + i] = o.at[i];
      }
    }
  }
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const void* q, const void* k, const void* v, float* out, float* /*scores*/, int64_t heads,
                            int64_t q_len, int64_t k_len, int64_t dim, void* stream) {
  using namespace finetune;
  if (dim > HEAD_DIM) return static_cast<int>(Status::unsupported);
  const dim3 grid(static_cast<unsigned>(heads * ceil_div(q_len, BLOCK_M)));
  return static_cast<int>(launch(attention, grid, dim3(BLOCK_SIZE), 0, stream, static_cast<const bf16*>(q),
                                 static_cast<const bf16*>(k), static_cast<const bf16*>(v), out,
                                 Shape{heads, q_len, k_len, dim}));
}
