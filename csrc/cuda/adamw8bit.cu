// AdamW with block-wise 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861), many tensors in one launch
// (tensor_list.cuh). The update is adamw.cu's; a moment is absmax · map[code], absmax of a quantization block.
//
// A warp takes a quantization block of 256 elements, eight adjacent ones a lane: it widens the moments, updates, finds
// the block's new absmax by shuffles, and rounds the moments to codes by a binary search among the middles between the
// map's values. Maps and middles (4 KB) are in shared memory. Products and sums are not contracted: the bits are those
// of the reference.
//
// Bytes: reads p, g, two codes and writes p, two codes, 16 a parameter in fp32 and 1/16 for the blocks' absmax, where
// fp32 moments take 28. About 60 operations a parameter, 18 of them look-ups in shared memory at random banks: 4
// operations a byte, still under the roof of memory bandwidth.
#include "finetune/adamw8bit.h"

#include "device/tensor_list.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 128, kBlock = AdamW8bit::block, kEach = kBlock / 32, kElements = 16 * kBlock;
using List = TensorList<AdamW8bitPiece, kElements>;

// The lane's elements of a block: by vectors, or one by one where the block is short (zeros) or an address is odd.
template <class T>
__device__ __forceinline__ Vector<T, kEach> read(const T* p, int left, bool vectors) {
  constexpr int N = kVector<T> < kEach ? kVector<T> : kEach;
  Vector<T, kEach> out;
#pragma unroll
  for (int i = 0; i < kEach; i += N) {
    Vector<T, N> part;
    if (vectors) part = load<T, N>(p + i);
#pragma unroll
    for (int j = 0; j < N; ++j) out.at[i + j] = vectors ? part.at[j] : i + j < left ? p[i + j] : T{};
  }
  return out;
}

template <class T>
__device__ __forceinline__ void write(T* p, const Vector<T, kEach>& v, int left, bool vectors) {
  constexpr int N = kVector<T> < kEach ? kVector<T> : kEach;
#pragma unroll
  for (int i = 0; i < kEach; i += N) {
    Vector<T, N> part;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      part.at[j] = v.at[i + j];
      if (!vectors && i + j < left) p[i + j] = v.at[i + j];
    }
    if (vectors) store(p + i, part);
  }
}

// The number of middles below x.
__device__ __forceinline__ uint8_t code_of(const float* middles, float x) {
  int code = 0;
#pragma unroll
  for (int step = kBlock / 2; step; step /= 2) code += middles[code + step - 1] < x ? step : 0;
  return static_cast<uint8_t>(code);
}

// The new largest magnitude of the block, and the codes of the lane's elements.
__device__ __forceinline__ float quantize(const float (&x)[kEach], const float* middles,
                                          Vector<uint8_t, kEach>& codes) {
  float absmax = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) absmax = fmaxf(absmax, fabsf(x[j]));
  absmax = warp_max(absmax);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    codes.at[j] = code_of(middles, absmax > 0 ? x[j] / absmax : 0.0f);
  }
  return absmax;
}

template <class P, class G>
__global__ void __launch_bounds__(BLOCK_SIZE)
    update(const __grid_constant__ AdamW8bit a, const __grid_constant__ List list) {
  SHARED(float, maps, [2 * kBlock]);
  SHARED(float, middles, [2 * kBlock]);
  for (int i = threadIdx.x; i < 2 * kBlock; i += BLOCK_SIZE) {
    maps[i] = a.maps[i];
    middles[i] = a.middles[i];
  }
  __syncthreads();

  const Slice at = slice(list);
  const AdamW8bitPiece& piece = list.pieces[at.piece];
  P* param = static_cast<P*>(piece.param);
  const G* grad = static_cast<const G*>(piece.grad);
  const bool aligned = are_aligned(param, grad, piece.exp_avg, piece.exp_avg_sq, piece.master);
  const float scale = a.grad_scale * (a.scale_tensor ? *a.scale_tensor : 1.0f);
  const int lane = threadIdx.x % 32, unsigned_at = kBlock;
  for (int64_t within = threadIdx.x / 32 * kBlock; within < at.size; within += BLOCK_SIZE / 32 * kBlock) {
    const int64_t block = (at.begin + within) / kBlock;
    const int64_t i = at.begin + within + lane * kEach;
    const int left = static_cast<int>(piece.size - i < kEach ? piece.size - i : kEach);
    const bool vectors = aligned && piece.size - (at.begin + within) >= kBlock;
    const auto grads = read(grad + i, left, vectors);
    auto params = read(param + i, left, vectors);
    auto m_codes = read(piece.exp_avg + i, left, vectors), v_codes = read(piece.exp_avg_sq + i, left, vectors);
    Vector<float, kEach> wide;
#pragma unroll
    for (int j = 0; j < kEach; ++j) wide.at[j] = to_float(params.at[j]);
    if (piece.master) wide = read(piece.master + i, left, vectors);
    const float m_max = piece.exp_avg_max[block], v_max = piece.exp_avg_sq_max[block];
    float m[kEach], v[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float g = __fmul_rn(to_float(grads.at[j]), scale);
      const float m_old = __fmul_rn(maps[m_codes.at[j]], m_max);
      const float v_old = __fmul_rn(maps[unsigned_at + v_codes.at[j]], v_max);
      m[j] = __fadd_rn(__fmul_rn(m_old, a.beta1), __fmul_rn(g, a.one_minus_beta1));
      v[j] = __fadd_rn(__fmul_rn(v_old, a.beta2), __fmul_rn(__fmul_rn(g, g), a.one_minus_beta2));
      const float size = __fmul_rn(a.step_size, m[j]) / __fadd_rn(__fmul_rn(sqrtf(v[j]), a.rsqrt_bc2), a.eps);
      wide.at[j] = __fadd_rn(__fmul_rn(wide.at[j], a.decay), -size);
      params.at[j] = from_float<P>(wide.at[j]);
      if (j >= left) m[j] = v[j] = 0;
    }
    write(param + i, params, left, vectors);
    if (piece.master) write(piece.master + i, wide, left, vectors);
    const float m_new = quantize(m, middles, m_codes), v_new = quantize(v, middles + unsigned_at, v_codes);
    write(piece.exp_avg + i, m_codes, left, vectors);
    write(piece.exp_avg_sq + i, v_codes, left, vectors);
    __syncwarp();  // all lanes have read the old maxima
    if (lane == 0) {
      piece.exp_avg_max[block] = m_new;
      piece.exp_avg_sq_max[block] = v_new;
    }
  }
}

}  // namespace

template <>
Status launch_cuda(const AdamW8bit& a, void* stream) {
  return for_each_adamw_list<kElements>(a, [&](auto param, auto grad, const List& list, unsigned blocks) {
    return launch(update<decltype(param), decltype(grad)>, dim3(blocks), dim3(BLOCK_SIZE), 0, stream, a, list);
  });
}

}  // namespace finetune
