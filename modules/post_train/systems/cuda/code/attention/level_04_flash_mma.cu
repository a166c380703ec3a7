// FlashAttention-2 on tensor cores: a warp owns 16 queries, and scores never leave its registers.
//
// S = Q·Kᵀ by mma into fp32 fragments; a row of S lies in the four lanes of a quad, so two shuffles give its maximum.
// The fragment in which mma leaves P is, packed to bf16, the very one in which it takes A: P·V follows without any
// exchange. k and v tiles are swizzled (matmul level 7); K needs no .trans, since its rows are what mma takes as
// columns of Kᵀ. (Dao 2023, arXiv:2307.08691, algorithm 1.)
#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int kDim = 64, kTile = 64, kWarps = 4, kThreads = 32 * kWarps, kWide = 8, kChunks = kDim / kWide;
using Chunk = Vector<bf16, kWide>;

struct Shape {
  int64_t heads, q_len, k_len, dim;
};

__device__ __forceinline__ int place(int row, int chunk) { return row * kChunks + (chunk ^ row % 8); }

// Rows [first, first + 64) of a (rows, dim) matrix, padded with 0 to 64 columns.
__device__ __forceinline__ void fetch(Chunk* tile, const bf16* x, int64_t first, int64_t rows, int64_t dim) {
  const bool aligned = are_aligned(x) && dim % kWide == 0;
  for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool inside = first + row < rows;
    const bf16* from = x + (first + row) * dim + chunk * kWide;
    Chunk v;
    if (aligned && inside && chunk * kWide < dim) {
      v = load<bf16, kWide>(from);
    } else {
      for (int j = 0; j < kWide; ++j) v.at[j] = inside && chunk * kWide + j < dim ? from[j] : from_float<bf16>(0.0f);
    }
    tile[place(row, chunk)] = v;
  }
}

__global__ void __launch_bounds__(kThreads)
    attention(const bf16* q, const bf16* k, const bf16* v, float* out, Shape s) {
  SHARED(Chunk, qs, [kTile * kChunks]);
  SHARED(Chunk, ks, [kTile * kChunks]);
  SHARED(Chunk, vs, [kTile * kChunks]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t parts = ceil_div(s.q_len, kTile), head = blockIdx.x / parts, top = blockIdx.x % parts * kTile;
  const float scale = rsqrtf(static_cast<float>(s.dim)) * 1.44269504f;  // 2^x is cheaper than e^x
  fetch(qs, q + head * s.q_len * s.dim, top, s.q_len, s.dim);
  __syncthreads();
  unsigned queries[kDim / 16][4];  // this warp's 16 × 64, as A fragments
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    ptx::ldmatrix_x4(queries[i], qs + place(16 * warp + lane % 16, 2 * i + lane / 16));
  }
  float sum[kDim / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {};  // of rows lane / 4 and lane / 4 + 8
  for (int64_t first = 0; first < s.k_len; first += kTile) {
    fetch(ks, k + head * s.k_len * s.dim, first, s.k_len, s.dim);
    fetch(vs, v + head * s.k_len * s.dim, first, s.k_len, s.dim);
    __syncthreads();
    float p[kTile / 8][4] = {};  // scores, then probabilities: 16 × 64
#pragma unroll
    for (int j = 0; j < kTile / 16; ++j) {
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        unsigned keys[4];
        ptx::ldmatrix_x4(keys, ks + place(16 * j + lane % 8 + lane / 16 * 8, 2 * i + lane / 8 % 2));
        ptx::mma_16x8x16<bf16>(p[2 * j], queries[i], keys[0], keys[1]);
        ptx::mma_16x8x16<bf16>(p[2 * j + 1], queries[i], keys[2], keys[3]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // row lane / 4, then row lane / 4 + 8
      float larger = most[half];
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const bool inside = first + 8 * j + lane % 4 * 2 + i % 2 < s.k_len;
          p[j][i] = inside ? p[j][i] * scale : -INFINITY;
          larger = fmaxf(larger, p[j][i]);
        }
      }
      larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 1));
      larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 2));
      const float rescale = ptx::exp2(most[half] - larger);
      most[half] = larger;
      total[half] *= rescale;
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          total[half] += p[j][i] = ptx::exp2(p[j][i] - larger);
          sum[j][i] *= rescale;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTile / 16; ++j) {
      unsigned a[4] = {ptx::pack<bf16>(p[2 * j][0], p[2 * j][1]), ptx::pack<bf16>(p[2 * j][2], p[2 * j][3]),
                       ptx::pack<bf16>(p[2 * j + 1][0], p[2 * j + 1][1]),
                       ptx::pack<bf16>(p[2 * j + 1][2], p[2 * j + 1][3])};
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        unsigned values[4];
        ptx::ldmatrix_x4_trans(values, vs + place(16 * j + lane % 16, 2 * i + lane / 16));
        ptx::mma_16x8x16<bf16>(sum[2 * i], a, values[0], values[1]);
        ptx::mma_16x8x16<bf16>(sum[2 * i + 1], a, values[2], values[3]);
      }
    }
    __syncthreads();  // before the next tile overwrites this one
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
    const int64_t row = top + 16 * warp + lane / 4 + 8 * half;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const int64_t d = 8 * j + lane % 4 * 2;
      const float two[2] = {sum[j][2 * half] / total[half], sum[j][2 * half + 1] / total[half]};
      float* to = out + (head * s.q_len + row) * s.dim + d;
      if (row < s.q_len && d + 1 < s.dim && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
        store(to, Vector<float, 2>{{two[0], two[1]}});
      } else {
        for (int i = 0; row < s.q_len && i < 2 && d + i < s.dim; ++i) to[i] = two[i];
      }
    }
  }
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const void* q, const void* k, const void* v, float* out, float* /*scores*/, int64_t heads,
                            int64_t q_len, int64_t k_len, int64_t dim, void* stream) {
  using namespace finetune;
  if (dim > kDim) return static_cast<int>(Status::unsupported);
  const dim3 grid(static_cast<unsigned>(heads * ceil_div(q_len, kTile)));
  return static_cast<int>(launch(attention, grid, dim3(kThreads), 0, stream, static_cast<const bf16*>(q),
                                 static_cast<const bf16*>(k), static_cast<const bf16*>(v), out,
                                 Shape{heads, q_len, k_len, dim}));
}
