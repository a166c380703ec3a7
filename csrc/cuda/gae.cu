// Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438) as a segmented scan backwards in time. A
// step is an affine map of what comes after it,
//   A_t = b_t + k_t · A_{t+1},   b = r + γ · V(next) − V (without V(next) where terminated),   k = γ λ, or 0 where a
// segment ends, and affine maps compose: (k, b) after (k', b') is (k k', b + k b'). So time is scanned in parallel
// (Blelloch 1990, "Prefix sums and their applications").
//
// A block takes up to 32 neighboring columns of (steps, columns), so that a warp reads whole lines, and goes over time
// in tiles from the end: each thread keeps four steps of a column in registers and their composition in shared memory,
// log2(segments) rounds compose those behind it, then it walks its four steps from what enters them. A tile's first A
// enters the tile before. With one column a tile is 1024 steps, with 32 or more it is 32.
// Memory: 14 bytes in and 8 out an element in fp32, each once. About 7 FLOPs an element for the maps, 6 for composing
// them: under 1 FLOP a byte, the roof is memory bandwidth.
#include "finetune/gae.h"

#include "device/launch.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 256, kItems = 4;

struct Map {
  float k = 1, b = 0;

  // No product with zero: nothing crosses the end of a segment, not even a NaN.
  __device__ float of(float x) const { return k == 0 ? b : b + k * x; }
  __device__ Map after(Map later) const { return {k * later.k, of(later.b)}; }
};

template <class T>
__global__ void __launch_bounds__(BLOCK_SIZE) scan(Gae a, int columns) {
  SHARED(Map, maps, [BLOCK_SIZE]);
  const int here = threadIdx.x, segment = here / columns, segments = BLOCK_SIZE / columns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * columns + here % columns;
  const auto gamma = static_cast<float>(a.gamma), decay = static_cast<float>(a.decay);
  const int64_t steps = a.steps, tile = static_cast<int64_t>(segments) * kItems;
  float carry = 0;  // the advantage after this tile
  for (int64_t start = ceil_div(steps, tile) * tile - tile; start >= 0; start -= tile) {
    const int64_t first = start + segment * kItems;
    Map step[kItems], all;
    float value[kItems];
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      if (column < a.columns && first + i < steps) {
        const int64_t at = (first + i) * a.columns + column;
        const bool terminated = a.terminated[at], truncated = a.truncated[at];
        const float next = to_float(static_cast<const T*>(a.next_values)[at]);
        value[i] = to_float(static_cast<const T*>(a.values)[at]);
        const float future = terminated ? 0 : gamma * next;
        step[i] = {terminated || truncated ? 0 : decay,
                   to_float(static_cast<const T*>(a.rewards)[at]) + future - value[i]};
      }
      all = step[i].after(all);
    }
    maps[here] = all;
    for (int by = 1; by < segments; by *= 2) {
      __syncthreads();
      const Map later = segment + by < segments ? maps[here + by * columns] : Map{};
      __syncthreads();
      maps[here] = all = all.after(later);
    }
    __syncthreads();
    float advantage = segment + 1 < segments ? maps[here + columns].of(carry) : carry;
    carry = maps[here % columns].of(carry);
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      advantage = step[i].of(advantage);
      if (column < a.columns && first + i < steps) {
        const int64_t at = (first + i) * a.columns + column;
        static_cast<float*>(a.advantages)[at] = advantage;
        static_cast<float*>(a.returns)[at] = advantage + value[i];
      }
    }
    __syncthreads();  // maps are free again
  }
}

}  // namespace

template <>
Status launch_cuda(const Gae& a, void* stream) {
  if (!a.steps || !a.columns) return Status::ok;
  int columns = 1;
  while (columns < 32 && columns < a.columns) columns *= 2;
  return for_dtype(a.dtype, [&](auto t) {
    const dim3 grid(static_cast<unsigned>(ceil_div(a.columns, columns)));
    return launch(scan<decltype(t)>, grid, dim3(BLOCK_SIZE), 0, stream, a, columns);
  });
}

}  // namespace finetune
