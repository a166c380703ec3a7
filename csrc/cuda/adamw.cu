// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2), many tensors in one launch (tensor_list.cuh).
//
//   m ← β1 m + (1 − β1) g,   v ← β2 v + (1 − β2) g²
//   p ← (1 − lr λ) p − lr / (1 − β1^t) · m / (sqrt(v) / sqrt(1 − β2^t) + eps)
//
// A thread takes groups of four adjacent elements, 16 bytes in fp32 where all of a tensor's addresses allow it. The
// clipping scale is read from device memory, so the host need not know it.
//
// Bytes: p, g, m, v are read and p, m, v written once, 28 a parameter in fp32, as many with 16-bit parameters and
// gradients and an fp32 master. FLOPs: about 15 a parameter, 0.5 a byte: the roof is memory bandwidth.
#include "finetune/adamw.h"

#include "device/tensor_list.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int BLOCK_SIZE = 128, kElements = 4096;
using List = TensorList<AdamWPiece, kElements>;

template <class P, class G>
__global__ void __launch_bounds__(BLOCK_SIZE)
    update(const __grid_constant__ AdamW a, const __grid_constant__ List list) {
  const Slice at = slice(list);
  const AdamWPiece& piece = list.pieces[at.piece];
  P* param = static_cast<P*>(piece.param) + at.begin;
  const G* grad = static_cast<const G*>(piece.grad) + at.begin;
  float *m = piece.exp_avg + at.begin, *v = piece.exp_avg_sq + at.begin;
  float* master = piece.master ? piece.master + at.begin : nullptr;
  const bool aligned = are_aligned(param, grad, m, v, master);
  const float scale = a.grad_scale * (a.scale_tensor ? *a.scale_tensor : 1.0f);
  for_each_group<4>(at.size, aligned, [&]<int N>(int64_t i) {
    const auto grads = load<G, N>(grad + i);
    auto params = load<P, N>(param + i);
    auto first = load<float, N>(m + i), second = load<float, N>(v + i);
    Vector<float, N> wide;
#pragma unroll
    for (int j = 0; j < N; ++j) wide.at[j] = to_float(params.at[j]);
    if (master) wide = load<float, N>(master + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float g = to_float(grads.at[j]) * scale;
      first.at[j] = first.at[j] * a.beta1 + g * a.one_minus_beta1;
      second.at[j] = second.at[j] * a.beta2 + g * g * a.one_minus_beta2;
      wide.at[j] = wide.at[j] * a.decay - a.step_size * first.at[j] / (sqrtf(second.at[j]) * a.rsqrt_bc2 + a.eps);
      params.at[j] = from_float<P>(wide.at[j]);
    }
    store(m + i, first);
    store(v + i, second);
    if (master) store(master + i, wide);
    store(param + i, params);
  });
}

}  // namespace

template <>
Status launch_cuda(const AdamW& a, void* stream) {
  return for_each_adamw_list<kElements>(a, [&](auto param, auto grad, const List& list, unsigned blocks) {
    return launch(update<decltype(param), decltype(grad)>, dim3(blocks), dim3(BLOCK_SIZE), 0, stream, a, list);
  });
}

}  // namespace finetune
