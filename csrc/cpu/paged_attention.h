// Attention of a few queries over a paged cache, one task a (sequence, kv head, piece of 256 tokens): scores of all
// rows (queries of the heads that share the kv head), their softmax, the weighted sum of the values; then the pieces
// are joined (Flash-Decoding). Keys and values are read once from the pool, 64 tokens at a time, for all rows: where
// they lie in fp32, otherwise converted into a tile that stays in the first cache.
//
// Bytes: 2 · tokens · kv_heads · (dim · bytes [+ 4 for scales]) of the cache, which is nearly everything. 4 · rows
// FLOPs an element of the cache: below about 8 rows a core's memory bandwidth is the roof, above it FMA throughput. A
// softcap costs a tanh a score.
// A decode step that is one call runs attend() and join() in its own parallel region.
#pragma once

#include "attention_common.h"
#include "eight_bit.h"
#include "finetune/paged_attention.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int64_t kPiece = PagedAttention::piece;

// Tokens [first, first + n) of a pool as pointers to `dim` floats each, which are in `tile` if the pool has another
// type.
template <class C>
FINETUNE_INLINE void rows_of(const PagedAttention& a, const KvPool& pool, int64_t b, int64_t kv_head, int64_t first,
                             int64_t n, int64_t ld, float* tile, const float** rows) {
  int64_t block = first / a.block_size, offset = first % a.block_size;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t id = a.table[b * a.width + block], at = offset * a.kv_heads + kv_head;
    const C* x = static_cast<const C*>(pool.data) + id * pool.block + at * a.dim;
    if constexpr (std::is_same_v<C, float>) {
      rows[j] = x;
    } else {
      const float scale = pool.scale ? pool.scale[id * pool.scale_block + at] : 1.0f;
      rows[j] = tile + j * ld;
      for_each_vector(a.dim, [&](int64_t d, auto get, auto) {
        const vf y = get(x + d);
        store(tile + j * ld + d, std::is_same_v<C, bf16> ? y : y * scale);
      });
    }
    if (++offset == a.block_size) ++block, offset = 0;
  }
}

// scores[j] = q · keys[j]: dots of kLanes keys at a time, their sums by a transposition.
FINETUNE_INLINE void score(const float* q, const float* const* keys, int64_t n, int64_t dim, float* scores) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const float* of[kLanes];  // lanes past the last key repeat it
    vf dot[kLanes] = {}, x{};
    for (int64_t i = 0; i < kLanes; ++i) of[i] = keys[smaller(j + i, n - 1)];
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      const vf right = load(q + d);
      for (int i = 0; i < kLanes; ++i) dot[i] += load(of[i] + d) * right;
    }
    if (d < dim) {
      for (int i = 0; i < kLanes; ++i) dot[i] += load_part(of[i] + d, dim - d) * load(q + d);
    }
    transpose(dot);
    for (int i = 0; i < kLanes; ++i) x += dot[i];
    store(scores + j, x);
  }
}

template <int kChunks>
FINETUNE_INLINE void weigh(const float* p, const float* const* values, int64_t n, int64_t d, float* o) {
  vf sum[kChunks];
  for (int c = 0; c < kChunks; ++c) sum[c] = load(o + d + c * kLanes);
  for (int64_t j = 0; j < n; ++j) {
    for (int c = 0; c < kChunks; ++c) sum[c] += p[j] * load(values[j] + d + c * kLanes);
  }
  for (int c = 0; c < kChunks; ++c) store(o + d + c * kLanes, sum[c]);
}

// o += Σ_j p[j] values[j]
FINETUNE_INLINE void add_values(const float* p, const float* const* values, int64_t n, int64_t dim, float* o) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) weigh<4>(p, values, n, d, o);
  for (; d + kLanes <= dim; d += kLanes) weigh<1>(p, values, n, d, o);
  if (d < dim) {
    vf rest = load(o + d);
    for (int64_t j = 0; j < n; ++j) rest += p[j] * load_part(values[j] + d, dim - d);
    store(o + d, rest);
  }
}

// Scores become c log2(e) tanh(score); room for a vector behind them.
FINETUNE_INLINE void cap_scores(float* scores, int64_t n, float cap) {
  for (int64_t j = 0; j < n; j += kLanes) store(scores + j, vtanh(load(scores + j)) * cap);
}

// Scores become 2^(score − top), and their sum `total`; room for a vector behind them.
FINETUNE_INLINE void softmax(float* scores, int64_t n, float& top, float& total) {
  store(scores + n, set1(-__builtin_inff()));
  vf most = set1(-__builtin_inff()), sums{};
  for (int64_t j = 0; j < n; j += kLanes) most = vmax(load(scores + j), most);
  top = max(most);
  for (int64_t j = 0; j < n; j += kLanes) {
    const vf p = vexp2(load(scores + j) - top);
    sums += p;
    store(scores + j, p);
  }
  total = sum(sums);
}

template <class T>
FINETUNE_INLINE void put(const PagedAttention& a, int64_t row, const float* o, float top, float total) {
  T* to = static_cast<T*>(a.out) + row * a.dim;
  const float factor = total == 0 ? 0.0f : 1.0f / total;
  for_each_vector(a.dim, [&](int64_t d, auto, auto put) { put(to + d, load(o + d) * factor); });
  a.lse[row] = (top + std::log2(total)) / kLog2e;
}

template <class T, class C>
void attend(const PagedAttention& a, int64_t b, int64_t kv_head, int64_t piece, float* scratch) {
  const int64_t dim = a.dim, ld = round_up(dim, 16), group = a.heads / a.kv_heads, rows = a.queries * group;
  const int64_t begin = smaller(piece * kPiece, seen_by(a, b, a.queries - 1).last),
                end = smaller(begin + kPiece, seen_by(a, b, a.queries - 1).last);
  const int64_t from = begin > seen_by(a, b, 0).first ? begin : seen_by(a, b, 0).first;
  if (from >= end && a.pieces > 1) return;
  Arena arena{scratch};
  float* const q = arena.take(rows * ld);
  float* const o = arena.take(rows * ld);
  float* const scores = arena.take(rows * (kPiece + 32));
  float* const tile = arena.take(kPagedTile * ld);
  float* const tops = arena.take(rows * 2);
  const float* of[kPagedTile];
  const bool capped = a.softcap > 0;
  const float factor = capped ? a.scale / a.softcap : a.scale * kLog2e;
  // The part [first, last) of `n` tokens from `at` on that row r sees
  const auto part = [&](int64_t r, int64_t at, int64_t n) {
    const Seen seen = seen_by(a, b, r / group);
    const int64_t last = seen.last > at ? smaller(seen.last - at, n) : 0, first = seen.first > at ? seen.first - at : 0;
    return Seen{smaller(first, last), last};
  };
  const auto q_at = [&](int64_t r) {
    return static_cast<const T*>(a.q) + b * a.q_batch + r / group * a.q_query +
           (kv_head * group + r % group) * a.q_head;
  };
  for (int64_t r = 0; r < rows; ++r) {
    for_each_vector(dim, [&](int64_t d, auto get, auto) { store(q + r * ld + d, get(q_at(r) + d) * factor); });
  }
  std::memset(o, 0, rows * ld * sizeof(float));

  for (int64_t at = from; at < end; at += kPagedTile) {
    const int64_t n = smaller(kPagedTile, end - at);
    rows_of<C>(a, a.k, b, kv_head, at, n, ld, tile, of);
    for (int64_t r = 0; r < rows; ++r) {
      const Seen s = part(r, at, n);
      if (s.first < s.last) {
        float* const to = scores + r * (kPiece + 32) + at - from + s.first;
        score(q + r * ld, of + s.first, s.last - s.first, dim, to);
        if (capped) cap_scores(to, s.last - s.first, a.softcap * kLog2e);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Seen s = part(r, from, end - from);
    softmax(scores + r * (kPiece + 32) + s.first, s.last > s.first ? s.last - s.first : 0, tops[2 * r],
            tops[2 * r + 1]);
  }
  for (int64_t at = from; at < end; at += kPagedTile) {
    const int64_t n = smaller(kPagedTile, end - at);
    rows_of<C>(a, a.v, b, kv_head, at, n, ld, tile, of);
    for (int64_t r = 0; r < rows; ++r) {
      const Seen s = part(r, at, n);
      if (s.first < s.last) {
        add_values(scores + r * (kPiece + 32) + at - from + s.first, of + s.first, s.last - s.first, dim, o + r * ld);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = (b * a.queries + r / group) * a.heads + kv_head * group + r % group;
    if (a.pieces == 1) {
      put<T>(a, row, o + r * ld, tops[2 * r], tops[2 * r + 1]);
    } else {
      std::memcpy(a.sums + (row * a.pieces + piece) * dim, o + r * ld, dim * sizeof(float));
      std::memcpy(a.tops + (row * a.pieces + piece) * 2, tops + 2 * r, 2 * sizeof(float));
    }
  }
}

// The pieces of one row, in order.
template <class T>
void join(const PagedAttention& a, int64_t row, float* o) {
  const Seen seen = seen_by(a, row / (a.queries * a.heads), row / a.heads % a.queries);
  const int64_t first = seen.first / kPiece, last = (seen.last + kPiece - 1) / kPiece;
  const float *sums = a.sums + row * a.pieces * a.dim, *tops = a.tops + row * a.pieces * 2;
  float top = -__builtin_inff(), total = 0;
  for (int64_t i = first; i < last; ++i) top = tops[2 * i] > top ? tops[2 * i] : top;
  std::memset(o, 0, round_up(a.dim, 16) * sizeof(float));
  for (int64_t i = first; i < last; ++i) {
    const float weight = vexp2(set1(tops[2 * i] - top))[0];
    total += tops[2 * i + 1] * weight;
    for_each_vector(a.dim,
                    [&](int64_t d, auto get, auto) { store(o + d, load(o + d) + get(sums + i * a.dim + d) * weight); });
  }
  put<T>(a, row, o, top, total);
}

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
