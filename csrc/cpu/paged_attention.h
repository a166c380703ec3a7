// Attention of a few queries over a paged cache, one task a (sequence, kv head, piece of 256 tokens): scores of all
// rows (queries of the heads that share the kv head), their softmax, the weighted sum of the values; then the pieces
// are joined (Flash-Decoding). Keys and values are read once from the pool, 64 tokens at a time, for all rows: keys
// transposed and values converted into a tile that stays in the first cache (values in fp32 are read where they lie).
// Then 6 rows at a time share each load of it: keys or elements of values in the lanes, no sum is horizontal.
//
// Bytes: 2 · tokens · kv_heads · (dim · bytes [+ 4 for scales]) of the cache, which is nearly everything. 4 · rows
// FLOPs an element of the cache: below about 8 rows a core's memory bandwidth is the roof, above it FMA throughput. A
// softcap costs a tanh a score.
// A decode step that is one call runs attend() and join() in its own parallel region.
#pragma once

#include "attention_common.h"
#include "eight_bit.h"
#include "finetune/paged_attention.h"
#include "row_blocks.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int64_t kPiece = PagedAttention::piece;

constexpr int kAttended = kLanes == 16 ? 6 : 2;  // rows at once: their sums, 4 vectors each, fill the registers

// body(j, x, scale) for tokens first + j of a pool, j < n: where they lie.
template <class C, class Body>
FINETUNE_INLINE void each_token(const PagedAttention& a, const KvPool& pool, int64_t b, int64_t kv_head, int64_t first,
                                int64_t n, Body&& body) {
  int64_t block = first / a.block_size, offset = first % a.block_size;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t id = a.table[b * a.width + block], at = offset * a.kv_heads + kv_head;
    body(j, static_cast<const C*>(pool.data) + id * pool.block + at * a.dim,
         pool.scale ? pool.scale[id * pool.scale_block + at] : 1.0f);
    if (++offset == a.block_size) ++block, offset = 0;
  }
}

// Values as pointers to `dim` floats each, which are in `tile` if the pool has another type.
template <class C>
FINETUNE_INLINE void rows_of(const PagedAttention& a, int64_t b, int64_t kv_head, int64_t first, int64_t n, int64_t ld,
                             float* tile, const float** rows) {
  each_token<C>(a, a.v, b, kv_head, first, n, [&](int64_t j, const C* x, float scale) {
    if constexpr (std::is_same_v<C, float>) {
      rows[j] = x;
    } else {
      rows[j] = tile + j * ld;
      for_each_vector(a.dim, [&](int64_t d, auto get, auto) {
        const vf y = get(x + d);
        store(tile + j * ld + d, std::is_same_v<C, bf16> ? y : y * scale);
      });
    }
  });
}

// Keys transposed: element d of key j at tile[d · kPagedTile + j]. Lanes past the last key repeat it.
template <class C>
FINETUNE_INLINE void columns_of(const PagedAttention& a, int64_t b, int64_t kv_head, int64_t first, int64_t n,
                                float* tile) {
  const C* of[kPagedTile];
  float scales[kPagedTile];
  each_token<C>(a, a.k, b, kv_head, first, n,
                [&](int64_t j, const C* x, float scale) { of[j] = x, scales[j] = scale; });
  for (int64_t j = n; j < round_up(n, kLanes); ++j) of[j] = of[n - 1], scales[j] = scales[n - 1];
  for (int64_t j = 0; j < n; j += kLanes) {
    int64_t d = 0;
    if constexpr (std::is_same_v<C, bf16>) {  // two elements at a time
      for (; d + 2 * kLanes <= a.dim; d += 2 * kLanes) {
        vf pair[kLanes];
        for (int i = 0; i < kLanes; ++i) std::memcpy(&pair[i], of[j + i] + d, sizeof(vf));
        transpose(pair);
        for (int i = 0; i < kLanes; ++i) {
          float* const to = tile + (d + 2 * i) * kPagedTile + j;
          store(to, (vf)((vu)pair[i] << 16));
          store(to + kPagedTile, (vf)((vu)pair[i] & 0xffff0000u));
        }
      }
    }
    for (; d < a.dim; d += kLanes) {
      const int64_t wide = smaller(kLanes, a.dim - d);
      vf x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        x[i] = wide == kLanes ? load(of[j + i] + d) : load_part(of[j + i] + d, wide);
        if constexpr (sizeof(C) == 1) x[i] *= scales[j + i];
      }
      transpose(x);
      for (int i = 0; i < wide; ++i) store(tile + (d + i) * kPagedTile + j, x[i]);
    }
  }
}

// scores[r][j] = q[r] · key j for kRows rows: keys in the lanes, sums over d in order.
template <int kRows, int kVectors>
FINETUNE_INLINE void score_some(const float* q, int64_t ld, const float* keys, int64_t dim, float* scores,
                                int64_t scores_ld) {
  vf sum[kRows][kVectors] = {};
  for (int64_t d = 0; d < dim; ++d) {
    vf key[kVectors];
    for (int c = 0; c < kVectors; ++c) key[c] = load(keys + d * kPagedTile + c * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const vf x = set1(q[r * ld + d]);
      for (int c = 0; c < kVectors; ++c) sum[r][c] += x * key[c];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVectors; ++c) store(scores + r * scores_ld + c * kLanes, sum[r][c]);
  }
}
template <int kRows>
FINETUNE_INLINE void score(const float* q, int64_t ld, const float* keys, int64_t n, int64_t dim, float* scores,
                           int64_t scores_ld) {
  int64_t j = 0;
  for (; j + 3 * kLanes < n; j += 4 * kLanes) score_some<kRows, 4>(q, ld, keys + j, dim, scores + j, scores_ld);
  for (; j < n; j += kLanes) score_some<kRows, 1>(q, ld, keys + j, dim, scores + j, scores_ld);
}

// o[r] += Σ_j p[r][j] values[j] for kRows rows, in order.
template <int kRows, int kVectors>
FINETUNE_INLINE void weigh(const float* p, int64_t p_ld, const float* const* values, int64_t n, int64_t d, float* o,
                           int64_t ld) {
  vf sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVectors; ++c) sum[r][c] = load(o + r * ld + d + c * kLanes);
  }
  for (int64_t j = 0; j < n; ++j) {
    vf value[kVectors];
    for (int c = 0; c < kVectors; ++c) value[c] = load(values[j] + d + c * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const vf x = set1(p[r * p_ld + j]);
      for (int c = 0; c < kVectors; ++c) sum[r][c] += x * value[c];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVectors; ++c) store(o + r * ld + d + c * kLanes, sum[r][c]);
  }
}
template <int kRows>
FINETUNE_INLINE void add_values(const float* p, int64_t p_ld, const float* const* values, int64_t n, int64_t dim,
                                float* o, int64_t ld) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) weigh<kRows, 4>(p, p_ld, values, n, d, o, ld);
  for (; d + kLanes <= dim; d += kLanes) weigh<kRows, 1>(p, p_ld, values, n, d, o, ld);
  if (d == dim) return;
  for (int r = 0; r < kRows; ++r) {
    vf rest = load(o + r * ld + d);
    for (int64_t j = 0; j < n; ++j) rest += p[r * p_ld + j] * load_part(values[j] + d, dim - d);
    store(o + r * ld + d, rest);
  }
}

// Scores become c log2(e) tanh(score); room for a vector behind them.
FINETUNE_INLINE void cap_scores(float* scores, int64_t n, float cap) {
  for (int64_t j = 0; j < n; j += kLanes) store(scores + j, vtanh(load(scores + j)) * cap);
}

// Scores [first, last) become 2^(score − top), and their sum `total`; those in the same vectors are lost.
FINETUNE_INLINE void softmax(float* scores, int64_t first, int64_t last, float& top, float& total) {
  int64_t begin = first / kLanes * kLanes;
  for (int64_t j = begin; j < first; ++j) scores[j] = -__builtin_inff();
  store(scores + last, set1(-__builtin_inff()));
  vf most = set1(-__builtin_inff()), sums{};
  for (int64_t j = begin; j < last; j += kLanes) most = vmax(load(scores + j), most);
  top = max(most);
  for (int64_t j = begin; j < last; j += kLanes) {
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
  constexpr int64_t wide = kPiece + 32;
  float* const scores = arena.take(rows * wide);  // of the piece's tokens
  float* const tile = arena.take(kPagedTile * ld);
  float* const tops = arena.take(rows * 2);
  const float* of[kPagedTile];
  const bool capped = a.softcap > 0;
  const float factor = capped ? a.scale / a.softcap : a.scale * kLog2e;
  // The part [first, last) of `n` tokens from `at` on that row r sees; both grow with r.
  const auto part = [&](int64_t r, int64_t at, int64_t n) {
    const Seen seen = seen_by(a, b, r / group);
    const int64_t last = seen.last > at ? smaller(seen.last - at, n) : 0, first = seen.first > at ? seen.first - at : 0;
    return Seen{smaller(first, last), last};
  };
  // body(at, n) for the tiles that some row sees; the first begins where it would for any other rows
  const int64_t base = piece * kPiece;
  const auto each_tile = [&](auto&& body) {
    for (int64_t at = from / kPagedTile * kPagedTile; at < end; at += kPagedTile)
      body(at, smaller(kPagedTile, end - at));
  };
  const auto q_at = [&](int64_t r) {
    return static_cast<const T*>(a.q) + b * a.q_batch + r / group * a.q_query +
           (kv_head * group + r % group) * a.q_head;
  };
  for (int64_t r = 0; r < rows; ++r) {
    for_each_vector(dim, [&](int64_t d, auto get, auto) { store(q + r * ld + d, get(q_at(r) + d) * factor); });
  }
  std::memset(o, 0, rows * ld * sizeof(float));
  each_token<C>(a, a.v, b, kv_head, from, end - from, [&](int64_t, const C* x, float) {  // read when scores are known
    for (int64_t i = 0; i < dim; i += 64 / static_cast<int64_t>(sizeof(C))) __builtin_prefetch(x + i);
  });

  each_tile([&](int64_t at, int64_t n) {
    columns_of<C>(a, b, kv_head, at, n, tile);
    in_tiles<kAttended>(rows, [&]<int kRows>(int64_t r) {
      const int64_t first = part(r, at, n).first, last = part(r + kRows - 1, at, n).last;
      if (first >= last) return;
      float* const to = scores + r * wide + at - base;
      score<kRows>(q + r * ld, ld, tile, last, dim, to, wide);
      for (int i = 0; capped && i < kRows; ++i) cap_scores(to + i * wide, last, a.softcap * kLog2e);
    });
  });
  for (int64_t r = 0; r < rows; ++r) {
    const Seen s = part(r, base, kPiece);
    softmax(scores + r * wide, s.first, s.last, tops[2 * r], tops[2 * r + 1]);
  }
  each_tile([&](int64_t at, int64_t n) {
    rows_of<C>(a, b, kv_head, at, n, ld, tile, of);
    const auto add = [&]<int kRows>(int64_t r, int64_t first, int64_t last) {
      if (first >= last) return;
      add_values<kRows>(scores + r * wide + at - base + first, wide, of + first, last - first, dim, o + r * ld, ld);
    };
    in_tiles<kAttended>(rows, [&]<int kRows>(int64_t r) {  // what all see together, what is before and behind it alone
      const int64_t last = part(r, at, n).last, first = smaller(part(r + kRows - 1, at, n).first, last);
      for (int i = 0; i < kRows; ++i) {
        const Seen s = part(r + i, at, n);
        add.template operator()<1>(r + i, s.first, smaller(first, s.last));
      }
      add.template operator()<kRows>(r, first, last);
      for (int i = 0; i < kRows; ++i) {
        const Seen s = part(r + i, at, n);
        add.template operator()<1>(r + i, s.first > last ? s.first : last, s.last);
      }
    });
  });
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
