// Attention's forward pass for sm_90, after FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608): the maths of
// attention.cu, with copies by TMA, products by wgmma, and warps that specialize. Head dims 64 and 128, 16 bits.
//
// A block has 128 queries of one head and three warpgroups of 128 threads. The first gives its registers away, and one
// thread of it copies: q, then k and v of 128 keys at a time, each into two stages. The other two have 64 queries each:
//   S = q kᵀ (both in shared memory);  the online softmax on its registers;  O += P v (P in registers, v transposed on
//   the way by wgmma).  While one of them works on its softmax, the other's products keep the tensor cores busy.
// Nothing but mbarriers stands between producer and consumers: full (the bytes have landed) and empty (eight consumer
// warps have read) of each stage; a phase's parity is that of the times the stage was used.
//
// Shared memory: tiles as TMA leaves them, panels of 64 columns with rows of 128 bytes, swizzled; q, then k and v of
// each stage: 80 KiB for D = 64, 160 KiB for 128. 168 registers a thread, moved to the consumers; no spills. DRAM and
// FLOPs as in attention.cu: q, k, v, o once, 4 D FLOPs for each visible pair; 128 queries take 128 FLOPs from each byte
// of k and v, so from about a thousand tokens on the roof is the tensor cores. In addition to products a score costs
// four instructions, FMNMX, FFMA, MUFU and FADD (attention_softmax.cuh); seven, with FMUL, ISETP and FSEL, before the
// scale went into the FFMA and masks to the last tiles.
#include "finetune/attention_hopper.h"

#include "attention_softmax.cuh"
#include "device/ptx_hopper.cuh"

namespace finetune {
namespace {

using attention::WorkTile;
using ptx::Mbarrier;

constexpr int BLOCK_M = 128, BLOCK_N = 128, kStages = 2, kThreads = 3 * 128, kConsumers = 2 * 128;
constexpr int kPanel = 64;                // columns of a tile that lie together, 128 bytes a row
constexpr unsigned kEightRows = 8 * 128;  // bytes
// A block's registers, as ptxas deals them out at its start (tests hold it to that), and as they are moved.
constexpr int kRegisters = 168, kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * kRegisters, "the consumers would wait for ever");
static_assert(kRegisters == 65536 / kThreads / 8 * 8);

struct Arguments : AttentionCuda {
  ptx::TensorMap q_map, k_map, v_map;
};

template <class T, int D>
struct Memory {
  static constexpr size_t kTiles = (BLOCK_M + 2 * kStages * BLOCK_N) * D * sizeof(T);
  static constexpr size_t kBytes = kTiles + (1 + 4 * kStages) * sizeof(Mbarrier);
  unsigned char* start;

  __device__ T* q() const { return reinterpret_cast<T*>(start); }
  __device__ T* k(int stage) const { return q() + (BLOCK_M + 2 * stage * BLOCK_N) * D; }
  __device__ T* v(int stage) const { return k(stage) + BLOCK_N * D; }
  __device__ Mbarrier* q_full() const { return reinterpret_cast<Mbarrier*>(start + kTiles); }
  __device__ Mbarrier* k_full(int stage) const { return q_full() + 1 + 4 * stage; }
  __device__ Mbarrier* v_full(int stage) const { return k_full(stage) + 1; }
  __device__ Mbarrier* k_empty(int stage) const { return k_full(stage) + 2; }
  __device__ Mbarrier* v_empty(int stage) const { return k_full(stage) + 3; }
};

// One thread: a tile of 128 tokens of a head, panel by panel.
template <class T, int D>
__device__ __forceinline__ void copy_tile(T* to, const ptx::TensorMap* map, int64_t head, int64_t token, int64_t batch,
                                          Mbarrier* full) {
  static_assert(BLOCK_M == BLOCK_N);
  const unsigned bytes = BLOCK_M * D * sizeof(T);
  ptx::mbarrier_expect(full, bytes);
#pragma unroll
  for (int c = 0; c < D; c += kPanel) {
    ptx::tensor_copy(to + c * BLOCK_M, map, c, static_cast<int>(head), static_cast<int>(token), static_cast<int>(batch),
                     full);
  }
}

template <class T, int D>
__device__ __forceinline__ void produce(const Arguments& a, const Memory<T, D>& m, const WorkTile& work, int begin,
                                        int tiles) {
  const int64_t kv_head = work.head / (a.heads / a.kv_heads);
  if (tiles) copy_tile<T, D>(m.q(), &a.q_map, work.head, work.first, work.s.batch, m.q_full());
  for (int n = 0; n < tiles; ++n) {
    const int stage = n % kStages, parity = n / kStages % 2;
    ptx::mbarrier_wait(m.k_empty(stage), parity ^ 1);
    copy_tile<T, D>(m.k(stage), &a.k_map, kv_head, begin + n * BLOCK_N, work.s.batch, m.k_full(stage));
    ptx::mbarrier_wait(m.v_empty(stage), parity ^ 1);
    copy_tile<T, D>(m.v(stage), &a.v_map, kv_head, begin + n * BLOCK_N, work.s.batch, m.v_full(stage));
  }
}

// A warpgroup's (64, N) result of wgmma: a lane has rows lane / 4 and lane / 4 + 8 of its warp's 16, and of every eight
// columns two, from 2 (lane % 4) on.
template <int N>
struct Accumulator {
  static constexpr int kColumns = N / 4;
  float d[N / 2];
  __device__ float& at(int r, int c) { return d[4 * (c / 2) + 2 * r + c % 2]; }
};

__device__ __forceinline__ int column_of(int c) { return c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2; }

__device__ __forceinline__ uint64_t tile_matrix(const void* p, unsigned stride, unsigned leading) {
  return ptx::matrix(p, stride, leading);
}

// The consumers' 256 threads: zeros for the rows of a tile of v from `end` on, which are behind the sequence's end.
// Their weights are zero, but what a padded batch holds there may be NaN, and 0 · NaN is NaN.
template <class T, int D>
__device__ __forceinline__ void clear_behind_the_end(T* v, int end) {
  constexpr int V = kVector<T>, kChunks = kPanel / V;
  if (end >= BLOCK_N) return;
  const int thread = static_cast<int>(threadIdx.x) - (kThreads - kConsumers);
  for (int i = thread; i < (BLOCK_N - end) * (D / V); i += kConsumers) {  // whole rows: the swizzle stays within them
    const int row = end + i / (D / V), panel = i % (D / V) / kChunks;
    ptx::store_shared16(v + (panel * BLOCK_N + row) * kPanel + i % kChunks * V, {});
  }
  ptx::async_proxy_fence();
  ptx::named_barrier<1, kConsumers>();
}

// A consumer warpgroup's 64 queries, from `first_row` of the block's on.
template <class T, int D, bool kRules>
__device__ __forceinline__ void consume(const Arguments& a, const Memory<T, D>& m, const WorkTile& work, int begin,
                                        int tiles, int first_row) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, first = first_row + 16 * warp + lane / 4;
  const int least = work.s.limit(work.first + first_row);
  const auto over_row = [](float x, auto&& join) {  // four lanes have a row
    x = join(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return join(x, __shfl_xor_sync(0xffffffffu, x, 2));
  };
  const auto query = [&](int row) { return min(work.first + row, work.s.queries - 1); };
  const auto passed = [&](int r) { return work.s.passed(query(first + 8 * r)); };
  const int most_passed = work.s.passed(query(first_row + 63));
  int limit[2];
  attention::OnlineSoftmax<2> softmax(a, kRules);
  Accumulator<D> acc;
#pragma unroll
  for (int r = 0; r < 2; ++r) limit[r] = work.s.limit(query(first + 8 * r));
#pragma unroll
  for (int i = 0; i < D / 2; ++i) acc.d[i] = 0;

  if (tiles) ptx::mbarrier_wait(m.q_full(), 0);
  for (int n = 0; n < tiles; ++n) {
    const int stage = n % kStages, parity = n / kStages % 2;
    const auto release = [&](Mbarrier* empty) {
      if (lane == 0) ptx::mbarrier_arrive(empty);
    };
    Accumulator<BLOCK_N> s;
    ptx::mbarrier_wait(m.k_full(stage), parity);
    ptx::wgmma_fence(s.d);
#pragma unroll
    for (int c = 0; c < D; c += 16) {
      const int at = c / kPanel * BLOCK_M * kPanel + c % kPanel;
      ptx::wgmma<T, BLOCK_N>(s.d, tile_matrix(m.q() + first_row * kPanel + at, kEightRows, 16),
                             tile_matrix(m.k(stage) + at, kEightRows, 16), c > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(s.d);
    release(m.k_empty(stage));

    const int key = begin + n * BLOCK_N;
    const bool masked = key + BLOCK_N > least || (kRules && key < most_passed);  // the last tiles; a window's first
    const auto visible = [&](int r, int c) {
      const int j = key + column_of(c);
      return j < limit[r] && (!kRules || j >= passed(r));
    };
    softmax.step(s, acc, masked, visible, over_row);

    unsigned probability[BLOCK_N / 16][4];
#pragma unroll
    for (int c = 0; c < BLOCK_N / 16; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        probability[c][i] = ptx::pack<T>(s.d[8 * c + 2 * i], s.d[8 * c + 2 * i + 1]);
      }
    }
    ptx::mbarrier_wait(m.v_full(stage), parity);
    if (n + 1 == tiles && work.s.keys < a.keys) clear_behind_the_end<T, D>(m.v(stage), work.s.keys - key);
    ptx::wgmma_fence(acc.d, probability);
#pragma unroll
    for (int c = 0; c < BLOCK_N / 16; ++c) {
      ptx::wgmma<T, D>(acc.d, probability[c],
                       tile_matrix(m.v(stage) + c * 16 * kPanel, kEightRows, BLOCK_N * kPanel * sizeof(T)), true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(acc.d, probability);
    release(m.v_empty(stage));
  }

  softmax.finish(over_row);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float factor = softmax.inverse_sum(r);
    const int row = first + 8 * r;
    if (row >= work.rows) continue;
    const int64_t i = attention::row_index(a, work.s, work.head, work.first + row);
    if (lane % 4 == 0) {
      a.m[i] = softmax.log2_max(r);
      a.l[i] = softmax.l[r];
    }
    T* const to = attention::at<T>(a.o, work.s, work.first + row, work.head) + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const float* x = acc.d + 4 * j + 2 * r;
      *reinterpret_cast<unsigned*>(to + 8 * j) = ptx::pack<T>(x[0] * factor, x[1] * factor);
    }
  }
}

template <class T, int D, bool kRules>
__global__ void __launch_bounds__(kThreads, 1) forward(const __grid_constant__ Arguments a) {
  DYN_SHARED(unsigned char, memory);
  const WorkTile work =
      attention::work_tile(a, gridDim.x - 1 - blockIdx.x, false, BLOCK_M, 1, kRules);  // long causal rows first
  if (!work.rows) return;
  const Memory<T, D> m{memory};
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(m.q_full(), 1);
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(m.k_full(s), 1);
      ptx::mbarrier_init(m.v_full(s), 1);
      ptx::mbarrier_init(m.k_empty(s), kConsumers / 32);
      ptx::mbarrier_init(m.v_empty(s), kConsumers / 32);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  const int begin = work.s.passed(work.first), end = work.s.limit(work.first + work.rows - 1);
  const int tiles = static_cast<int>(ceil_div(max(end - begin, 0), BLOCK_N));
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<T, D>(a, m, work, begin, tiles);
  } else {
    ptx::more_registers<kConsumerRegisters>();
    consume<T, D, kRules>(a, m, work, begin, tiles, (warpgroup - 1) * 64);
  }
}

// Strides that TMA takes: 16-byte multiples. A dimension of at most one element has any stride; it gets a valid one.
void strides_of(int64_t (&strides)[4], const AttentionView& x, int64_t dim, int64_t heads, int64_t tokens,
                int64_t batch) {
  strides[0] = 1;
  strides[1] = heads <= 1 ? dim : x.head;
  strides[2] = tokens <= 1 ? dim : x.token;
  strides[3] = batch <= 1 ? dim : x.batch;
}

bool is_readable(const AttentionView& x, int64_t dim, int64_t heads, int64_t tokens, int64_t batch) {
  int64_t strides[4];
  strides_of(strides, x, dim, heads, tokens, batch);
  for (int i = 1; i < 4; ++i) {
    if (strides[i] % 8 || strides[i] <= 0) return false;
  }
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// The map of (batch, token, head, dim) memory, in boxes of 128 tokens of one head; false: the driver refuses.
template <class T>
bool make_map(ptx::TensorMap& map, const AttentionView& x, int64_t dim, int64_t heads, int64_t tokens, int64_t batch) {
  int64_t strides[4];
  strides_of(strides, x, dim, heads, tokens, batch);
  return ptx::make_tensor_map<T>(map, x.data, {dim, heads, tokens, batch}, strides, {kPanel, 1, BLOCK_M, 1});
}

template <class T, int D>
Status launch_forward(const AttentionCuda& a, void* stream) {
  const int64_t blocks = a.batch * a.heads * attention::tiles_of(a, a.queries, BLOCK_M);
  if (!blocks) return Status::ok;
  if (blocks > 0x7fffffff) return Status::unsupported;
  Arguments args{a, {}, {}, {}};
  if (!make_map<T>(args.q_map, a.q, D, a.heads, a.queries, a.batch) ||
      !make_map<T>(args.k_map, a.k, D, a.kv_heads, a.keys, a.batch) ||
      !make_map<T>(args.v_map, a.v, D, a.kv_heads, a.keys, a.batch)) {
    return Status::no_tensor_map;
  }
  const auto kernel = a.window > 0 || a.softcap > 0 ? forward<T, D, true> : forward<T, D, false>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), Memory<T, D>::kBytes, stream, args);
}

}  // namespace

const char* why_not_hopper(const AttentionCuda& a) {
#if defined(__CUDACC__)
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major != 9) return "the GPU is not of compute capability 9";
#endif
  if (a.dtype == DType::f32) return "it takes bfloat16 and float16";
  if (a.dim != 64 && a.dim != 128) return "it takes head dims 64 and 128";
  if (a.offsets.data) return "it takes no cu_seqlens";
  if (a.mask.data) return "it takes no mask";
  if (!a.keys) return "there are no keys";
  if (!is_readable(a.q, a.dim, a.heads, a.queries, a.batch) || !is_readable(a.k, a.dim, a.kv_heads, a.keys, a.batch) ||
      !is_readable(a.v, a.dim, a.kv_heads, a.keys, a.batch)) {
    return "it takes addresses and strides of multiples of 16 bytes";
  }
  return nullptr;
}

template <>
Status launch_cuda(const AttentionHopper& a, void* stream) {
  if (why_not_hopper(a)) return Status::unsupported;
  return for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<T, float>) {
      return Status::unsupported;
    } else {
      return a.dim == 64 ? launch_forward<T, 64>(a, stream) : launch_forward<T, 128>(a, stream);
    }
  });
}

}  // namespace finetune
