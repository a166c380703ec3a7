// Attention without the score matrix: online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) over key blocks, as
// FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithm 1. Per row of q, over key blocks with scores s = scale q·k:
//   m' = max(m, max s),   p = exp(s − m'),   l = l exp(m − m') + Σ p,   o = o exp(m − m') + p V;   at the end o / l.
//
// A query is a vector lane: scores are computed transposed, S^T (key, query) = K Q^T, so that maxima and sums run down
// the lanes, K and V are read as broadcast scalars in their natural layout, and only Q and O are transposed, once.
// Exponentials are to base 2, with log2(e) folded into Q.
//
// Memory: a worker holds one block of rows (kAttentionRows of q and o, fp32), one of keys (k and v) and one strip of
// scores. q and o move once, k and v once a row block. 4 · rows · visible keys · dim FLOPs, so the roof is FMA
// throughput (with few rows, as in decoding, memory bandwidth: few_rows() reads k and v in place). Blocks of keys that no
// row of a strip sees, being behind the causal limit, before the window or hidden by the mask, are skipped, and of the
// others the keys at both ends. A softcap costs a tanh a score; a mask is read as bits, 64 keys of a row at once.
#include "attention_backward.h"
#include "attention_common.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int64_t kFewRows = 8;

struct Strip {    // the softmax of one strip of queries
  float* scores;  // (keys, kStrip)
  float *top, *total, *alpha;
};

// Scores of the keys `seen` become exp2(score − top); `alpha` is what earlier sums must be multiplied by.
template <bool kMasked>
FINETUNE_INLINE void online_softmax(const Strip& s, const StripKeys& seen) {
  const int64_t n = seen.n;
  vf top[kTileVectors], sum[kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) top[v] = load(s.top + v * kLanes);
  for (int64_t j = 0; j < n; ++j) {
    for (int v = 0; v < kTileVectors; ++v) {
      float* at = s.scores + j * kStrip + v * kLanes;
      vf x = load(at);
      if constexpr (kMasked) {
        x = seen.key(j, v * kLanes) ? x : set1(-__builtin_inff());
        store(at, x);
      }
      top[v] = larger(x, top[v]);
    }
  }
  for (int v = 0; v < kTileVectors; ++v) {
    const vf before = load(s.top + v * kLanes);
    store(s.top + v * kLanes, top[v]);
    top[v] = top[v] == -__builtin_inff() ? vf{} : top[v];  // nothing visible yet: avoid inf − inf
    const vf alpha = vexp2(before - top[v]);
    store(s.alpha + v * kLanes, alpha);
    sum[v] = load(s.total + v * kLanes) * alpha;
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int v = 0; v < kTileVectors; ++v) {
      float* at = s.scores + j * kStrip + v * kLanes;
      const vf p = vexp2(load(at) - top[v]);
      sum[v] += p;
      store(at, p);
    }
  }
  for (int v = 0; v < kTileVectors; ++v) store(s.total + v * kLanes, sum[v]);
}

FINETUNE_INLINE void cap_scores(float* scores, int64_t n, float cap) {
  for (int64_t i = 0; i < n; i += kLanes) store(scores + i, vtanh(load(scores + i)) * cap);
}

template <class T>
void forward_rows(const Attention& a, const Group& g, int64_t first, int64_t count, float* scratch) {
  const int64_t dim = a.dim, ld = round_up(dim, kLanes) + 16, strips = (count + kStrip - 1) / kStrip;
  Arena arena{scratch};
  float* const q = arena.take(strips * dim * kStrip);  // (strip, dim, kStrip), as is o
  float* const o = arena.take(strips * dim * kStrip);
  float* const k = arena.take(kAttentionKeys * ld);
  float* const v = arena.take(kAttentionKeys * ld);
  float* const scores = arena.take(kAttentionKeys * kStrip);
  float* const top = arena.take(strips * kStrip);
  float* const total = arena.take(strips * kStrip);
  float* const alpha = arena.take(kStrip);
  int32_t limit[kAttentionRows] = {}, passed[kAttentionRows] = {};
  const uint8_t* mask[kAttentionRows];

  for (int64_t i = 0; i < strips * kStrip; i += kLanes) {
    const T* rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t r = i + lane;
      rows[lane] = r < count ? g.row<const T>(a.q, first + r) : nullptr;
      // Lanes past the last row do as that one does: they never ask for a mask, and nobody reads them.
      limit[r] = static_cast<int32_t>(g.visible(first + smaller(r, count - 1)));
      passed[r] = static_cast<int32_t>(g.passed(first + smaller(r, count - 1)));
      mask[r] = g.mask(a, first + smaller(r, count - 1));
    }
    pack_columns(rows, dim, score_scale(a), q + (i / kStrip) * dim * kStrip + i % kStrip, kStrip);
    store(top + i, set1(-__builtin_inff()));
    store(total + i, vf{});
  }
  std::memset(o, 0, strips * dim * kStrip * sizeof(float));

  const int64_t keys = limit[count - 1];
  for (int64_t key = passed[0]; key < keys; key += kAttentionKeys) {
    const int64_t in_block = smaller(kAttentionKeys, keys - key);
    bool packed = false;
    for (int64_t i = 0; i < strips; ++i) {
      const int32_t *const limits = limit + i * kStrip, *const starts = passed + i * kStrip;
      const int64_t n = smaller(in_block, limits[kStrip - 1] - key);  // both rise: the last sees the farthest
      if (n <= 0 || starts[0] >= key + n) continue;
      const StripKeys seen(starts, limits, mask + i * kStrip, key, n);
      if (!seen.n) continue;
      if (!packed) {
        pack_rows(at<const T>(a.k, g.s, key, g.kv_head), a.k.token, in_block, dim, k, ld);
        pack_rows(at<const T>(a.v, g.s, key, g.kv_head), a.v.token, in_block, dim, v, ld);
        packed = true;
      }
      const int64_t from = (seen.first - key) * ld;
      gemm<A::by_rows, C::set>(seen.n, kStrip, dim, k + from, ld, q + i * dim * kStrip, kStrip, scores, kStrip);
      if (a.softcap > 0) cap_scores(scores, seen.n * kStrip, cap(a));
      const Strip strip{scores, top + i * kStrip, total + i * kStrip, alpha};
      seen.whole ? online_softmax<false>(strip, seen) : online_softmax<true>(strip, seen);
      gemm<A::by_columns, C::scale_add>(dim, kStrip, seen.n, v + from, ld, scores, kStrip, o + i * dim * kStrip, kStrip,
                                        alpha);
    }
  }

  for (int64_t i = 0; i < strips * kStrip; i += kLanes) {
    T* rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t r = i + lane;
      rows[lane] = r < count ? g.row<T>(a.o, first + r) : nullptr;
      if (r >= count) continue;
      a.top[g.row_index(a, first + r)] = top[r];
      a.total[g.row_index(a, first + r)] = total[r];
    }
    const vf l = load(total + i);
    unpack_columns(o + (i / kStrip) * dim * kStrip + i % kStrip, kStrip, dim, l == 0.0f ? vf{} : 1.0f / l, rows);
  }
}

// Up to kFewRows rows: lanes run along dim, k and v are read where they lie.
template <int kChunks, class T>
FINETUNE_INLINE void weigh(const float* p, int64_t n, const T* v, int64_t stride, float alpha, float* o) {
  vf sum[kChunks];
  for (int c = 0; c < kChunks; ++c) sum[c] = load(o + c * kLanes) * alpha;
  for (int64_t j = 0; j < n; ++j) {
    for (int c = 0; c < kChunks; ++c) sum[c] += p[j] * load(v + j * stride + c * kLanes);
  }
  for (int c = 0; c < kChunks; ++c) store(o + c * kLanes, sum[c]);
}

template <class T>
void few_rows(const Attention& a, const Group& g, float* scratch) {
  const int64_t dim = a.dim, ld = round_up(dim, kLanes), rows = g.rows();
  Arena arena{scratch};
  float* const q = arena.take(rows * ld);
  float* const o = arena.take(rows * ld);
  float* const scores = arena.take(kAttentionKeys);
  float top[kFewRows], total[kFewRows];
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = g.row<const T>(a.q, r);
    for_each_vector(dim, [&](int64_t d, auto get, auto) { store(q + r * ld + d, get(row + d) * score_scale(a)); });
    top[r] = -__builtin_inff();
    total[r] = 0;
  }
  std::memset(o, 0, rows * ld * sizeof(float));

  for (int64_t key = g.passed(0); key < g.visible(rows - 1); key += kAttentionKeys) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = key < g.passed(r) ? g.passed(r) : key;
      const int64_t n = smaller(key + kAttentionKeys, g.visible(r)) - from;
      if (n <= 0) continue;
      const uint8_t* const mask = g.mask(a, r);
      const uint64_t seen = mask ? mask_bits(mask + from, n) : low_bits(n);
      if (!seen) continue;
      const T* const k = at<const T>(a.k, g.s, from, g.kv_head);
      const T* const v = at<const T>(a.v, g.s, from, g.kv_head);
      vf block_top = set1(top[r]);
      for (int64_t j = 0; j < n; j += kLanes) {
        const T* of[kLanes];  // lanes past the last key repeat it, then are masked
        vf dot[kLanes] = {}, x{};
        for (int64_t i = 0; i < kLanes; ++i) of[i] = k + smaller(j + i, n - 1) * a.k.token;
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) {
          const vf right = load(q + r * ld + d);
          for (int i = 0; i < kLanes; ++i) dot[i] += load(of[i] + d) * right;
        }
        if (d < dim) {
          for (int i = 0; i < kLanes; ++i) dot[i] += load_part(of[i] + d, dim - d) * load(q + r * ld + d);
        }
        transpose(dot);
        for (int i = 0; i < kLanes; ++i) x += dot[i];
        if (a.softcap > 0) x = vtanh(x) * cap(a);
        for (int i = 0; i < kLanes; ++i) x[i] = seen >> (j + i) & 1 ? x[i] : -__builtin_inff();
        store(scores + j, x);
        block_top = larger(x, block_top);
      }
      const float next = larger(set1(max(block_top)), set1(top[r]))[0];
      const float base = next == -__builtin_inff() ? 0.0f : next;
      const float alpha = vexp2(set1(top[r] - base))[0];
      vf sums{};
      for (int64_t j = 0; j < n; j += kLanes) {
        const vf p = vexp2(load(scores + j) - base);
        sums += p;
        store(scores + j, p);
      }
      total[r] = total[r] * alpha + sum(sums);
      top[r] = next;
      int64_t d = 0;
      for (; d + 8 * kLanes <= dim; d += 8 * kLanes) weigh<8>(scores, n, v + d, a.v.token, alpha, o + r * ld + d);
      for (; d + kLanes <= dim; d += kLanes) weigh<1>(scores, n, v + d, a.v.token, alpha, o + r * ld + d);
      if (d < dim) {
        vf rest = load(o + r * ld + d) * alpha;
        for (int64_t j = 0; j < n; ++j) rest += scores[j] * load_part(v + j * a.v.token + d, dim - d);
        store(o + r * ld + d, rest);
      }
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    T* row = g.row<T>(a.o, r);
    const float factor = total[r] == 0 ? 0.0f : 1.0f / total[r];
    for_each_vector(dim, [&](int64_t d, auto, auto put) { put(row + d, load(o + r * ld + d) * factor); });
    a.top[g.row_index(a, r)] = top[r];
    a.total[g.row_index(a, r)] = total[r];
  }
}

template <class T>
void forward(const Attention& a) {
  const int64_t group = a.heads / a.kv_heads;
  int64_t block = kAttentionRows, tasks;
  const auto blocks_of = [&](const Sequence& s) { return (s.queries * group + block - 1) / block; };
  for (;; block /= 2) {  // smaller blocks where there would be few tasks
    tasks = 0;
    for (int64_t n = 0; n < a.sequences(); ++n) tasks += a.kv_heads * blocks_of(Sequence(a, n));
    if (tasks >= 16 || block <= 32) break;
  }
  each_task(a.workers, tasks, [&](int64_t worker, int64_t task) {
    int64_t n = 0;
    while (task >= a.kv_heads * blocks_of(Sequence(a, n))) task -= a.kv_heads * blocks_of(Sequence(a, n++));
    const Sequence s(a, n);
    const Group g{s, task / blocks_of(s), group};
    const int64_t first = (blocks_of(s) - 1 - task % blocks_of(s)) * block;  // long causal rows first
    float* const scratch = a.scratch + worker * attention_scratch(a.dim);
    if (g.rows() <= kFewRows) return few_rows<T>(a, g, scratch);
    forward_rows<T>(a, g, first, smaller(block, g.rows() - first), scratch);
  });
}

Status attention(const Attention& a) {
  a.dtype == DType::f32 ? forward<float>(a) : forward<bf16>(a);
  return Status::ok;
}

Status attention_backward(const AttentionBackward& a) {
  a.dtype == DType::f32 ? backward<float>(a) : backward<bf16>(a);
  return Status::ok;
}

FINETUNE_REGISTER(Attention, attention);
FINETUNE_REGISTER(AttentionBackward, attention_backward);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
