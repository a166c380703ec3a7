// Gradients of attention, FlashAttention-2 (arXiv:2307.08691), Algorithm 2. With P = 2^(S − top) / total recomputed:
//   dV = P^T dO,   dP = dO V^T,   delta = rowsum(dO ∘ O),   dS = P ∘ (dP − delta),   dQ = scale dS K,   dK = scale dS^T
//   Q.
// With a softcap S = c tanh(x), x = scale / c q·k, and dS is multiplied by dS/dx / c = 1 − tanh²(x) on its way to q and
// k.
// S, P, dP, dS are held transposed, (key, query), as in the forward pass.
//
// A task is the rows of one (sequence, kv head), or every parts-th block of them: dk and dv are summed in fp32 over its
// rows in order, dq over its keys in order; with several parts their sums are added in order afterwards. Memory: fp32
// dk and dv a worker (or a part), and blocks. 10 · rows · visible keys · dim FLOPs.
#pragma once

#include <type_traits>

#include "attention_common.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int64_t kScoresLd =
    kAttentionBackwardRows + 16;  // not a multiple of 4 KB over few rows: L1 sets are shared out

struct BackwardBlocks {
  float *q_columns, *grad_columns, *dq;  // (strip, dim, kStrip): scale log2(e) q, dO; dq's sum
  float *q, *grad;                       // (rows, ld)
  float *k, *v;                          // (keys, ld)
  float *p, *ds;                         // (keys, kScoresLd)
  float *top, *share, *delta;            // (rows,): share = 1 / total
  int64_t dim, ld;

  BackwardBlocks(Arena& arena, int64_t dim_) : dim(dim_), ld(round_up(dim_, kLanes) + 16) {
    for (float** p : {&q_columns, &grad_columns, &dq}) *p = arena.take(kAttentionBackwardRows * dim);
    for (float** p : {&q, &grad}) *p = arena.take(kAttentionBackwardRows * ld);
    for (float** p : {&k, &v}) *p = arena.take(kAttentionKeys * ld);
    for (float** p : {&p, &ds}) *p = arena.take(kAttentionKeys * kScoresLd);
    for (float** p : {&top, &share, &delta}) *p = arena.take(kAttentionBackwardRows);
  }
};

// P and dS of the keys `seen` of one strip, from S in p (its argument of tanh if kCapped, times `cap` S) and dP in ds.
template <bool kMasked, bool kCapped>
FINETUNE_INLINE void softmax_gradient(float* p, float* ds, const float* top, const float* share, const float* delta,
                                      const StripKeys& seen, float cap) {
  const int64_t n = seen.n;
  vf shift[kTileVectors], factor[kTileVectors], pull[kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) {
    shift[v] = load(top + v * kLanes);
    factor[v] = load(share + v * kLanes);
    pull[v] = load(delta + v * kLanes);
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int v = 0; v < kTileVectors; ++v) {
      float* const at = p + j * kScoresLd + v * kLanes;
      float* const slope = ds + j * kScoresLd + v * kLanes;
      vf score = load(at), slack{};  // 1 − tanh²
      if constexpr (kCapped) {
        const vf t = vtanh(score);
        score = t * cap;
        slack = 1.0f - t * t;
      }
      vf x = vexp2(score - shift[v]) * factor[v];
      if constexpr (kMasked) x = seen.key(j, v * kLanes) ? x : vf{};
      store(at, x);
      x *= load(slope) - pull[v];
      store(slope, kCapped ? x * slack : x);
    }
  }
}

template <class T>
void backward_rows(const AttentionBackward& a, const Group& g, int64_t first, int64_t count, const BackwardBlocks& b,
                   float* dk, float* dv) {
  const int64_t dim = b.dim, ld = b.ld, strips = (count + kStrip - 1) / kStrip, padded = round_up(dim, kLanes);
  int32_t limit[kAttentionBackwardRows], passed[kAttentionBackwardRows];
  const uint8_t* mask[kAttentionBackwardRows];
  for (int64_t i = 0; i < strips * kStrip; i += kLanes) {
    const T *q[kLanes], *grad[kLanes], *o[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t r = i + lane;
      const float total = r < count ? a.total[g.row_index(a, first + r)] : 0.0f;
      const bool real = total != 0;  // else it sees no key and adds nothing, whatever it holds
      q[lane] = real ? g.row<const T>(a.q, first + r) : nullptr;
      o[lane] = real ? g.row<const T>(a.o, first + r) : nullptr;
      grad[lane] = real ? g.row<const T>(a.grad_o, first + r) : nullptr;
      limit[r] = static_cast<int32_t>(g.visible(first + smaller(r, count - 1)));
      passed[r] = static_cast<int32_t>(g.passed(first + smaller(r, count - 1)));
      mask[r] = g.mask(a, first + smaller(r, count - 1));
      b.top[r] = real ? a.top[g.row_index(a, first + r)] : 0.0f;
      b.share[r] = real ? 1.0f / total : 0.0f;
      if (!real) {  // the products over rows take whole strips: zero rows add nothing
        std::memset(b.q + r * ld, 0, padded * sizeof(float));
        std::memset(b.grad + r * ld, 0, padded * sizeof(float));
        continue;
      }
      pack_rows(q[lane], 0, 1, dim, b.q + r * ld, ld);
      pack_rows(grad[lane], 0, 1, dim, b.grad + r * ld, ld);
    }
    const int64_t offset = (i / kStrip) * dim * kStrip + i % kStrip;
    pack_columns(q, dim, score_scale(a), b.q_columns + offset, kStrip);
    pack_columns(grad, dim, 1.0f, b.grad_columns + offset, kStrip);
    pack_columns(o, dim, 1.0f, b.dq + offset, kStrip);
    // Summed in the order of dP's products: where a row sees one key they cancel to the bit, as they should.
    vf delta{};
    for (int64_t d = 0; d < dim; ++d)
      delta += load(b.dq + offset + d * kStrip) * load(b.grad_columns + offset + d * kStrip);
    store(b.delta + i, delta);
  }
  std::memset(b.dq, 0, strips * dim * kStrip * sizeof(float));

  const int64_t keys = limit[count - 1];
  for (int64_t key = passed[0]; key < keys; key += kAttentionKeys) {
    const int64_t in_block = smaller(kAttentionKeys, keys - key);
    bool packed = false;  // some strip sees a key of the block
    int64_t done = 0;     // dk and dv of keys below are complete for this block of rows
    int64_t here = 1;     // strips from here on have passed the block's keys
    while (here < strips && passed[here * kStrip] < key + in_block) ++here;
    for (int64_t i = 0; i < here; ++i) {
      const int32_t *const limits = limit + i * kStrip, *const starts = passed + i * kStrip;
      const int64_t n = smaller(in_block, limits[kStrip - 1] - key);
      if (n <= 0) continue;
      const StripKeys seen(starts, limits, mask + i * kStrip, key, n);
      const int64_t from = seen.first - key;
      if (seen.n < n) {  // the products of dk and dv take all n keys
        for (float* const x : {b.p + i * kStrip, b.ds + i * kStrip}) {
          for (int64_t j = 0; j < n; ++j) {
            if (j < from || j >= from + seen.n) std::memset(x + j * kScoresLd, 0, kStrip * sizeof(float));
          }
        }
      }
      if (!seen.n) continue;
      if (!packed) {
        pack_rows(at<const T>(a.k, g.s, key, g.kv_head), a.k.token, in_block, dim, b.k, ld);
        pack_rows(at<const T>(a.v, g.s, key, g.kv_head), a.v.token, in_block, dim, b.v, ld);
        packed = true;
      }
      float *const p = b.p + i * kStrip + from * kScoresLd, *const ds = b.ds + i * kStrip + from * kScoresLd;
      const float *const k = b.k + from * ld, *const v = b.v + from * ld;
      gemm<A::by_rows, C::set>(seen.n, kStrip, dim, k, ld, b.q_columns + i * dim * kStrip, kStrip, p, kScoresLd);
      gemm<A::by_rows, C::set>(seen.n, kStrip, dim, v, ld, b.grad_columns + i * dim * kStrip, kStrip, ds, kScoresLd);
      const float *const top = b.top + i * kStrip, *const share = b.share + i * kStrip,
                         *const delta = b.delta + i * kStrip;
      const auto gradient = [&](auto capped) {
        seen.whole ? softmax_gradient<false, capped>(p, ds, top, share, delta, seen, cap(a))
                   : softmax_gradient<true, capped>(p, ds, top, share, delta, seen, cap(a));
      };
      a.softcap > 0 ? gradient(std::true_type{}) : gradient(std::false_type{});
      gemm<A::by_columns, C::add>(dim, kStrip, seen.n, k, ld, ds, kScoresLd, b.dq + i * dim * kStrip, kStrip);
    }
    if (!packed) continue;
    // Keys that strip i is the first to see get nothing from the strips before it.
    for (int64_t i = 0; i < here; ++i) {
      const int64_t n = smaller(in_block, limit[i * kStrip + kStrip - 1] - key), from = i * kStrip;
      if (n <= done) continue;
      const int64_t depth = here * kStrip - from, to = (key + done) * ld;
      const float *const p = b.p + done * kScoresLd + from, *const ds = b.ds + done * kScoresLd + from;
      gemm<A::by_rows, C::add>(n - done, padded, depth, p, kScoresLd, b.grad + from * ld, ld, dv + to, ld);
      gemm<A::by_rows, C::add>(n - done, padded, depth, ds, kScoresLd, b.q + from * ld, ld, dk + to, ld);
      done = n;
    }
  }

  for (int64_t i = 0; i < strips * kStrip; i += kLanes) {
    T* rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      rows[lane] = i + lane < count ? g.row<T>(a.dq, first + i + lane) : nullptr;
    }
    unpack_columns(b.dq + (i / kStrip) * dim * kStrip + i % kStrip, kStrip, dim, set1(a.scale), rows);
  }
}

// Writes dk and dv of one token: the sum of `parts` fp32 rows each, in order.
template <class T>
FINETUNE_INLINE void write_key(const AttentionBackward& a, const Sequence& s, int64_t token, int64_t head,
                               const float* dk, const float* dv, int64_t parts, int64_t stride) {
  T *const out_k = at<T>(a.dk, s, token, head), *const out_v = at<T>(a.dv, s, token, head);
  for_each_vector(a.dim, [&](int64_t d, auto, auto put) {
    vf sum_k{}, sum_v{};
    for (int64_t part = 0; part < parts; ++part) {
      sum_k += load(dk + part * stride + d);
      sum_v += load(dv + part * stride + d);
    }
    put(out_k + d, sum_k * a.scale);
    put(out_v + d, sum_v);
  });
}

template <class T>
void backward(const AttentionBackward& a) {
  const int64_t group = a.heads / a.kv_heads, ld = round_up(a.dim, kLanes) + 16, block = kAttentionBackwardRows;
  const int64_t per_worker = attention_backward_scratch(a.dim, a.longest, a.parts);
  const int64_t per_head = a.batch * a.keys * ld, per_part = a.kv_heads * per_head;  // of dk's partial sums
  float *const partial_k = a.partial, *const partial_v = a.partial + a.parts * per_part;
  each_task(a.workers, a.sequences() * a.kv_heads * a.parts, [&](int64_t worker, int64_t task) {
    const int64_t part = task % a.parts, head = task / a.parts % a.kv_heads;
    const Group g{Sequence(a, task / a.parts / a.kv_heads), head, group};
    Arena arena{a.scratch + worker * per_worker};
    const BackwardBlocks blocks(arena, a.dim);
    const int64_t at_partial = part * per_part + head * per_head + (g.s.batch * a.keys + g.s.begin) * ld;
    float* const dk = a.parts > 1 ? partial_k + at_partial : arena.take(g.s.keys * ld);
    float* const dv = a.parts > 1 ? partial_v + at_partial : arena.take(g.s.keys * ld);
    std::memset(dk, 0, g.s.keys * ld * sizeof(float));
    std::memset(dv, 0, g.s.keys * ld * sizeof(float));
    for (int64_t first = part * block; first < g.rows(); first += a.parts * block) {  // dealt out: causal rows differ
      backward_rows<T>(a, g, first, smaller(block, g.rows() - first), blocks, dk, dv);
    }
    if (a.parts > 1) return;
    const int64_t tokens = a.offsets ? g.s.keys : a.keys;
    for (int64_t j = 0; j < tokens; ++j) {  // a key past the length gets zeros
      write_key<T>(a, g.s, j, head, dk + j * ld, dv + j * ld, j < g.s.keys, 0);
    }
  });
  if (a.parts == 1) return;
  parallel_for(a.sequences() * a.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Sequence s(a, task / a.kv_heads);
      const int64_t head = task % a.kv_heads, tokens = a.offsets ? s.keys : a.keys;
      for (int64_t j = 0; j < tokens; ++j) {
        const int64_t from = head * per_head + (s.batch * a.keys + s.begin + j) * ld;
        write_key<T>(a, s, j, head, partial_k + from, partial_v + from, j < s.keys ? a.parts : 0, per_part);
      }
    }
  });
}

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
