// What attention's forward and backward share: which keys a row sees, where it lies, the task queue, 2^x.
//
// A "row" is one query of one head. The rows of all heads that share a key/value head are numbered position-major
// (row = position · group + head in group), so grouped heads reuse each packed key block and causal rows stay sorted
// by what they see.
#pragma once

#include "finetune/attention.h"
#include "gemm.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr float kLog2e = 1.44269504088896f;
static_assert(kStrip <= kAttentionMaxStrip && kAttentionBackwardRows % kStrip == 0);

struct Sequence {
  int64_t batch, begin, queries, keys, shift;  // tokens from `begin`; causal: key j <= query i + shift
  bool causal;
  int64_t window;

  Sequence(const AttentionShape& a, int64_t n) : batch(n), begin(0), queries(a.queries), keys(a.keys) {
    causal = a.causal;
    window = a.window;
    shift = a.keys - a.queries;
    if (a.lengths) keys = a.lengths[n] < 0 ? 0 : smaller(a.lengths[n], a.keys);
    if (a.offsets) {
      batch = 0, begin = a.offsets[n], shift = 0;
      queries = keys = a.offsets[n + 1] - begin;
    }
  }
  int64_t visible(int64_t query) const {
    if (!causal) return keys;
    const int64_t limit = query + shift + 1;
    return limit < 0 ? 0 : smaller(limit, keys);
  }
  // Keys before the query's window. It sees those from there to visible(query), which may be none.
  int64_t passed(int64_t query) const {
    const int64_t end = causal ? query + shift + 1 : keys;
    return window && end > window ? end - window : 0;
  }
};

template <class T>
FINETUNE_INLINE T* at(const AttentionView& x, const Sequence& s, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + s.batch * x.batch + (s.begin + token) * x.token + head * x.head;
}

// The rows of one sequence that share key/value head `kv_head`.
struct Group {
  Sequence s;
  int64_t kv_head, size;  // `size` query heads

  int64_t rows() const { return s.queries * size; }
  int64_t visible(int64_t row) const { return s.visible(row / size); }
  int64_t passed(int64_t row) const { return s.passed(row / size); }
  template <class T>
  FINETUNE_INLINE T* row(const AttentionView& x, int64_t row) const {
    return at<T>(x, s, row / size, kv_head * size + row % size);
  }
  int64_t row_index(const AttentionShape& a, int64_t row) const {
    return (s.batch * a.heads + kv_head * size + row % size) * a.queries + s.begin + row / size;
  }
  const uint8_t* mask(const AttentionShape& a, int64_t row) const {
    return a.mask.data ? a.mask.data + s.batch * a.mask.batch + row / size * a.mask.query : nullptr;
  }
};

// n <= 64 bytes of a mask, 0 or 1 each, as bits.
FINETUNE_INLINE uint64_t mask_bits(const uint8_t* mask, int64_t n) {
  uint64_t bits = 0;
  for (int64_t j = 0; j < n; j += 8) {
    uint64_t eight = 0;
    std::memcpy(&eight, mask + j, smaller(8, n - j));
    bits |= (eight * 0x0102040810204080u >> 56) << j;  // byte i times 2^(56 - 7i) is bit 56 + i, and no two meet
  }
  return bits;
}

FINETUNE_INLINE vi load_int(const int32_t* p) {
  vi out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

// The first n <= 64 bits.
FINETUNE_INLINE uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// Of the keys [first, first + n), n <= 64, those that a row sees: the keys [passed, limit) where its mask, if any, is 1.
FINETUNE_INLINE uint64_t seen_bits(int64_t passed, int64_t limit, const uint8_t* mask, int64_t first, int64_t n) {
  const int64_t begin = passed > first ? passed - first : 0, end = smaller(n, limit - first);
  if (begin >= end) return 0;
  const uint64_t range = low_bits(end) & ~low_bits(begin);
  return mask ? range & mask_bits(mask + first, n) : range;
}

// Which of at most 64 keys the rows of a strip see; limits and passed keys rise with the rows.
struct StripKeys {
  int64_t first, n;           // the keys [first, first + n): those given without the ends that no row sees
  bool whole;                 // every row sees every key
  uint32_t words[2][kStrip];  // else bit j % 32 of words[j / 32]: key first + j

  StripKeys(const int32_t* passed, const int32_t* limit, const uint8_t* const* mask, int64_t first_, int64_t n_)
      : first(first_), n(n_), whole(!mask[0] && limit[0] >= first + n && passed[kStrip - 1] <= first) {
    if (whole) return;
    uint64_t bits[kStrip], some = 0, every = ~uint64_t{0};
    for (int64_t r = 0; r < kStrip; ++r) {
      const bool again = r && mask[r] == mask[r - 1] && limit[r] == limit[r - 1] && passed[r] == passed[r - 1];
      bits[r] = again ? bits[r - 1] : seen_bits(passed[r], limit[r], mask[r], first, n);
      some |= bits[r];
      every &= bits[r];
    }
    const int64_t skipped = some ? __builtin_ctzll(some) : 0;
    first += skipped;
    n = some ? 64 - __builtin_clzll(some) - skipped : 0;
    whole = n && (every >> skipped & low_bits(n)) == low_bits(n);
    for (int64_t r = 0; r < kStrip; ++r) {
      words[0][r] = static_cast<uint32_t>(bits[r] >> skipped);
      words[1][r] = static_cast<uint32_t>(bits[r] >> skipped >> 32);
    }
  }
  // Key first + j, of the lanes from `lane` on.
  FINETUNE_INLINE vi key(int64_t j, int64_t lane) const {
    vu word;
    std::memcpy(&word, words[j / 32] + lane, sizeof word);
    return (vi)((word & (1u << j % 32)) != 0u);
  }
};

// body(worker, task) for every task; a worker takes the next task when it is done, since causal ones differ in size.
template <class F>
void each_task(int64_t workers, int64_t tasks, F&& body) {
  int64_t next = 0;
  parallel_for(smaller(workers, tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) body(worker, task);
    }
  });
}

struct Arena {  // pieces of a worker's scratch, each on a cache line
  float* free;
  float* take(int64_t floats) {
    float* const piece = free;
    free += round_up(floats, 16);
    return piece;
  }
};

// 2^x for x <= about 1, to 2 ulp: 2^round(x) · polynomial (Cephes exp2f) on |x - round(x)| <= 1/2. 0 below -126, so a
// masked -inf gives 0; a NaN stays one.
FINETUNE_INLINE vf vexp2(vf x) {
  const vf bounded = x < -126.0f ? set1(-126.0f) : x;
  const vf shifted = bounded + 12582912.0f;  // 1.5 * 2^23: the integer now stands in the low bits
  const vf r = bounded - (shifted - 12582912.0f);
  vf p = set1(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  p *= (vf)(((vu)shifted + 127u) << 23);
  return x < -126.0f ? vf{} : p;
}

// tanh to about 1 ulp: x + x³ P(x²) (Cephes tanhf) for |x| below 0.625, else ± (1 − 2e / (1 + e)) with e = e^(−2|x|).
FINETUNE_INLINE vf vtanh(vf x) {
  const vf size = x < 0.0f ? -x : x, e = vexp(size * -2.0f), large = 1.0f - 2.0f * e / (1.0f + e), z = x * x;
  vf p = set1(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return size < 0.625f ? p * z * x + x : (x < 0.0f ? -large : large);
}

// A score, to base 2, is log2(e) scale q·k, or with a softcap c log2(e) tanh(scale / c q·k): q is multiplied by this,
// and what tanh gives by cap().
inline float score_scale(const AttentionShape& a) { return a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2e; }
inline float cap(const AttentionShape& a) { return a.softcap * kLog2e; }

// max that takes b where either is NaN (vmaxps does the same).
FINETUNE_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
