// Hopper: TMA copies whole tiles, and wgmma multiplies them where they lie, in shared memory.
//
// One thread of a producer warpgroup asks the Tensor Memory Accelerator for tiles; an mbarrier counts the bytes that
// have landed (`full`), another one the warps that are done with the tile (`empty`). A consumer warpgroup multiplies:
// wgmma reads Q, K and V in shared memory, 64 × 64 × 16 products an instruction, and P in registers. No thread computes
// an address, no ldmatrix moves a fragment; rows behind the end are copied as zeros. TMA demands rows of whole 16
// bytes: others are padded first. (Shah et al. 2024, FlashAttention-3, arXiv:2407.08608.)
#include "device/launch.cuh"
#include "device/ptx_hopper.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int HEAD_DIM = 64, BLOCK_M = 64, BLOCK_N = 64, kStages = 2, kConsumers = 128, BLOCK_SIZE = kConsumers + 128;
constexpr unsigned kTileBytes = BLOCK_N * HEAD_DIM * sizeof(bf16), kEightRows = 8 * HEAD_DIM * sizeof(bf16);

struct Arguments {
  ptx::TensorMap q, k, v;
  float* out;
  int64_t heads, q_len, k_len, dim;
};

struct Barriers {
  ptx::Mbarrier q_full, full[kStages], empty[kStages];
};

// (rows, dim) to (rows, padded).
__global__ void __launch_bounds__(128) pad(const bf16* x, bf16* y, int64_t rows, int64_t dim, int64_t padded) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (i < rows * padded) y[i] = i % padded < dim ? x[i / padded * dim + i % padded] : from_float<bf16>(0.0f);
}

__device__ void produce(const Arguments& a, bf16* qs, bf16* tiles, Barriers& bars, int top, int head) {
  ptx::mbarrier_expect(&bars.q_full, kTileBytes);
  ptx::tensor_copy(qs, &a.q, 0, head, top, 0, &bars.q_full);
  for (int n = 0; n * BLOCK_N < a.k_len; ++n) {
    const int stage = n % kStages, parity = n / kStages % 2;
    bf16* tile = tiles + stage * 2 * BLOCK_N * HEAD_DIM;
    ptx::mbarrier_wait(&bars.empty[stage], parity ^ 1);
    ptx::mbarrier_expect(&bars.full[stage], 2 * kTileBytes);
    ptx::tensor_copy(tile, &a.k, 0, head, n * BLOCK_N, 0, &bars.full[stage]);
    ptx::tensor_copy(tile + BLOCK_N * HEAD_DIM, &a.v, 0, head, n * BLOCK_N, 0, &bars.full[stage]);
  }
}

// Of an accumulator a lane has rows lane / 4 and lane / 4 + 8 of its warp's 16: [4 j + 2 h + i] is the element of row
// lane / 4 + 8 h in column 8 j + 2 (lane % 4) + i.
__device__ void consume(const Arguments& a, const bf16* qs, const bf16* tiles, Barriers& bars, int top, int head) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float scale = rsqrtf(static_cast<float>(a.dim)) * 1.44269504f;
  float acc[HEAD_DIM / 2] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
  ptx::mbarrier_wait(&bars.q_full, 0);
  for (int n = 0; n * BLOCK_N < a.k_len; ++n) {
    const int stage = n % kStages;
    const bf16 *ks = tiles + stage * 2 * BLOCK_N * HEAD_DIM, *vs = ks + BLOCK_N * HEAD_DIM;
    ptx::mbarrier_wait(&bars.full[stage], n / kStages % 2);
    float p[BLOCK_N / 2];
    ptx::wgmma_fence(p);
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
      ptx::wgmma<bf16, BLOCK_N>(p, ptx::matrix(qs + d, kEightRows), ptx::matrix(ks + d, kEightRows), d > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(p);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m_new = m[h];
#pragma unroll
      for (int e = 0; e < BLOCK_N / 4; ++e) {
        float& score = p[e / 2 * 4 + 2 * h + e % 2];
        score = n * BLOCK_N + e / 2 * 8 + lane % 4 * 2 + e % 2 < a.k_len ? score * scale : -INFINITY;
        m_new = fmaxf(m_new, score);
      }
      for (int bits = 1; bits < 4; bits *= 2) m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffffu, m_new, bits));
      const float rescale = ptx::exp2(m[h] - m_new);
      m[h] = m_new;
      l[h] *= rescale;
#pragma unroll
      for (int e = 0; e < BLOCK_N / 4; ++e) {
        float& score = p[e / 2 * 4 + 2 * h + e % 2];
        l[h] += score = ptx::exp2(score - m_new);
        acc[e / 2 * 4 + 2 * h + e % 2] *= rescale;
      }
    }
    unsigned ps[BLOCK_N / 16][4];
#pragma unroll
    for (int i = 0; i < BLOCK_N / 4; ++i) ps[i / 4][i % 4] = ptx::pack<bf16>(p[2 * i], p[2 * i + 1]);
    ptx::wgmma_fence(acc, ps);
#pragma unroll
    for (int c = 0; c < BLOCK_N / 16; ++c) {
      ptx::wgmma<bf16, HEAD_DIM>(acc, ps[c], ptx::matrix(vs + c * 16 * HEAD_DIM, kEightRows, kTileBytes), true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(acc, ps);
    if (lane == 0) ptx::mbarrier_arrive(&bars.empty[stage]);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int bits = 1; bits < 4; bits *= 2) l[h] += __shfl_xor_sync(0xffffffffu, l[h], bits);
    const int64_t row = top + 16 * warp + lane / 4 + 8 * h;
    float* to = a.out + (head * a.q_len + row) * a.dim + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; ++j) {
      const Vector<float, 2> o{{acc[4 * j + 2 * h] / l[h], acc[4 * j + 2 * h + 1] / l[h]}};
      const int64_t left = row < a.q_len ? a.dim - (8 * j + lane % 4 * 2) : 0;
      if (a.dim % 2 == 0 && left > 0) store(to + 8 * j, o);
      for (int i = 0; i < 2 && i < left && a.dim % 2; ++i) to[8 * j + i] = o.at[i];
    }
  }
}

__global__ void __launch_bounds__(BLOCK_SIZE) attention(const __grid_constant__ Arguments a) {
  DYN_SHARED(bf16, tiles);  // 1024-byte aligned: K and V of each stage, then Q
  SHARED(Barriers, bars, [1]);
  const int blocks = static_cast<int>(ceil_div(a.q_len, BLOCK_M));
  const int head = blockIdx.x / blocks, top = blockIdx.x % blocks * BLOCK_M;
  bf16* qs = tiles + kStages * 2 * BLOCK_N * HEAD_DIM;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&bars[0].q_full, 1);
    for (int i = 0; i < kStages; ++i) ptx::mbarrier_init(&bars[0].full[i], 1), ptx::mbarrier_init(&bars[0].empty[i], 4);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == kConsumers) produce(a, qs, tiles, bars[0], top, head);
  if (threadIdx.x < kConsumers) consume(a, qs, tiles, bars[0], top, head);
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const void* q, const void* k, const void* v, float* out, float* scratch, int64_t heads,
                            int64_t q_len, int64_t k_len, int64_t dim, void* stream) {
  using namespace finetune;
  if (dim > HEAD_DIM) return static_cast<int>(Status::unsupported);
  Arguments a{{}, {}, {}, out, heads, q_len, k_len, dim};
  const int64_t padded = ceil_div(dim, 8) * 8, sizes[3] = {q_len, k_len, k_len};
  const void* from[3] = {q, k, v};
  ptx::TensorMap* maps[3] = {&a.q, &a.k, &a.v};
  bf16* room = reinterpret_cast<bf16*>(scratch);
  for (int i = 0; i < 3; ++i) {
    const int64_t rows = heads * sizes[i];
    if (padded != dim || reinterpret_cast<uintptr_t>(from[i]) % 16) {
      const dim3 grid(static_cast<unsigned>(ceil_div(rows * padded, 128)));
      const Status status =
          launch(pad, grid, dim3(128), 0, stream, static_cast<const bf16*>(from[i]), room, rows, dim, padded);
      if (status != Status::ok) return static_cast<int>(status);
      from[i] = room;
      room += rows * padded;
    }
    if (!ptx::make_tensor_map<bf16>(*maps[i], from[i], {padded, heads, sizes[i], 1},
                                    {1, sizes[i] * padded, padded, rows * padded}, {HEAD_DIM, 1, BLOCK_N, 1})) {
      return static_cast<int>(Status::no_tensor_map);
    }
  }
  const dim3 grid(static_cast<unsigned>(heads * ceil_div(q_len, BLOCK_M)));
  return static_cast<int>(launch(attention, grid, dim3(BLOCK_SIZE), (2 * kStages + 1) * kTileBytes, stream, a));
}
