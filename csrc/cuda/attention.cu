// Attention without the score matrix: FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithms 1 and 2, with the
// online softmax of Milakov & Gimelshein 2018 (arXiv:1805.02867). Per row of q, over tiles of keys, with the scores
// s = scale log2(e) q·k:
//   m' = max(m, max s),   p = 2^(s − m'),   l = 2^(m − m') l + Σ p,   o = 2^(m − m') o + p V;   at the end o / l.
// m and l are kept. Backward, with P = 2^(s − m) / l made again and delta = rowsum(dO ∘ O):
//   dV = Pᵀ dO,   dP = dO Vᵀ,   dS = P ∘ (dP − delta),   dQ = scale dS K,   dK = scale dSᵀ Q.
// With a softcap c, s = c log2(e) tanh(scale / c q·k), and dS is multiplied by 1 − tanh². A
// window skips the tiles that are outside of it for all rows of a block, so the work is tokens · window. A mask costs a
// byte a score, read where it is used, before the products: a warp makes none for a tile that its rows do not see.
// Kernels have these rules or lack them by kRules; those that lack them are as if there were none.
//
// A block holds a tile of tokens of one head (64 queries, or keys for dK and dV), a warp 16 rows of it; the tiles of
// the other side come through shared memory, by cp.async into two stages of pairs (k and v, or q and dO), swizzled so
// that ldmatrix meets no bank conflict. P goes from one mma's result to the next one's operand in registers. fp32 has
// the same kernels with tiles of 32 rows, one stage and no tensor cores (Warp<float, D>). Head dims are padded with
// zeros to 32, 64, 128 or 256, in shared memory only. Nothing is summed by atomics: the same bits at every run.
//   attention_common.cuh    masks, tiles, copies      attention_warp.cuh       products by a warp
//   attention_softmax.cuh   m, l, P of a tile         attention_forward.cuh    o, m, l
//   attention_decode.cuh    o, m, l of few queries     attention_backward.cuh   dq, then dk and dv
//
// Shared memory, of 16-bit types, forward / backward: D = 64 40 / 50 KiB, 128 80 / 65, 256 96 / 97.
// DRAM: q, k, v, o once (k and v come again for each query tile, from L2 where they fit). FLOPs for each visible
// (query, key) pair: 4 D forward; 14 D backward, 4 D of them because S and dP are made twice to need no atomics. With
// T tokens, causal, 16 bits: T² D · 2 FLOPs over 8 T D bytes = T / 4 FLOPs a byte: from about a thousand tokens on the
// roof is the tensor cores (fp32: the FMA units), below it memory bandwidth. A warp's 16 rows take 16 FLOPs from each
// byte that ldmatrix reads.
#include "attention_backward.cuh"
#include "attention_decode.cuh"
#include "attention_forward.cuh"

namespace finetune {
namespace {

using attention::kThreads;

// Calls f with the head dim that the tiles have.
template <class F>
Status for_dim(int64_t dim, F&& f) {
  if (dim > kAttentionCudaDim) return Status::unsupported;
  switch (attention_tile_dim(dim)) {
    case 32:
      return f(std::integral_constant<int, 32>{});
    case 64:
      return f(std::integral_constant<int, 64>{});
    case 128:
      return f(std::integral_constant<int, 128>{});
    default:
      return f(std::integral_constant<int, 256>{});
  }
}

// Calls f with kRules of the kernels.
template <class F>
Status for_rules(const AttentionSizes& a, F&& f) {
  if (a.mask.data) return f(std::integral_constant<int, attention::kMask>{});
  return a.window > 0 || a.softcap > 0 ? f(std::integral_constant<int, attention::kBounds>{})
                                       : f(std::integral_constant<int, attention::kNone>{});
}

template <class Args>
Status launch_blocks(void (*kernel)(Args), int64_t blocks, size_t shared, void* stream, const Args& a) {
  if (!blocks) return Status::ok;
  constexpr int64_t kMost = 0x7fffffff, kTile = 64;  // tokens are counted in int, up to a tile past the last
  if (blocks > kMost || a.queries > kMost - kTile || a.keys > kMost - kTile) return Status::unsupported;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared, stream, a);
}

}  // namespace

template <>
Status launch_cuda(const AttentionCuda& a, void* stream) {
  return for_dtype(a.dtype, [&](auto t) {
    return for_dim(a.dim, [&](auto dim) {
      using T = decltype(t);
      constexpr int D = dim, kBlockRows = attention::Warp<T, D>::kBlockRows;
      constexpr size_t kBytes = attention::ForwardMemory<T, D>::kBytes;
      if (!a.splits.count) {
        const int64_t blocks = a.batch * a.heads * attention::tiles_of(a, a.queries, kBlockRows);
        return for_rules(
            a, [&](auto rules) { return launch_blocks(attention::forward<T, D, rules>, blocks, kBytes, stream, a); });
      }
      const int64_t row_tiles = ceil_div(a.queries * (a.heads / a.kv_heads), kBlockRows);
      const int64_t blocks = a.batch * a.kv_heads * row_tiles * a.splits.count;
      const Status status = for_rules(
          a, [&](auto rules) { return launch_blocks(attention::decode<T, D, rules>, blocks, kBytes, stream, a); });
      if (status != Status::ok || a.splits.count == 1) return status;
      const int64_t rows = a.batch * a.heads * a.queries;
      return launch_blocks(attention::combine<T, D>, ceil_div(rows, attention::kWarps), 0, stream, a);
    });
  });
}

template <>
Status launch_cuda(const AttentionBackwardCuda& a, void* stream) {
  return for_dtype(a.dtype, [&](auto t) {
    return for_dim(a.dim, [&](auto dim) {
      using T = decltype(t);
      constexpr int D = dim;
      using W = attention::Warp<T, D>;
      constexpr size_t kBytes = attention::BackwardMemory<T, D>::kBytes;
      const int64_t tiles = attention::tiles_of(a, a.queries, W::kBlockRows);
      const Status status = for_rules(a, [&](auto rules) {
        return launch_blocks(attention::backward_queries<T, D, rules>, a.batch * a.heads * tiles, kBytes, stream, a);
      });
      if (status != Status::ok) return status;
      const int64_t parts = D / W::kKeyColumns, key_tiles = attention::tiles_of(a, a.keys, W::kBlockRows);
      const int64_t blocks = a.batch * a.kv_heads * key_tiles * parts;
      return for_rules(a, [&](auto rules) {
        return launch_blocks(attention::backward_keys<T, D, rules>, blocks, kBytes, stream, a);
      });
    });
  });
}

}  // namespace finetune
