// Attention of a few queries over many keys, a decoding step: Flash-Decoding (Dao et al. 2023). The rows of a tile are
// the queries of all heads that share a key/value head, so that keys and values are read once for them, and the keys
// are split: a block writes m, l and acc of its keys, and `combine` joins the splits of a row, in order:
//   m = max m_s,   l = Σ 2^(m_s − m) l_s,   o = Σ 2^(m_s − m) acc_s / l
// With a window only the keys that some row sees are split.
// The splits are a function of the sizes alone (attention_splits): the same bits on every GPU and at every run.
//
// Blocks: batch · kv_heads · splits, up to 264 as far as there are keys, instead of batch · heads. Bytes: keys and
// values once, not once for each head of a group; and 8 D for each row and split, in fp32, there and back: with 256
// keys a split, 16 bits and 8 rows, 6 % of the keys and values. FLOPs: of 64 rows of a tile only warps that have rows
// of their own multiply; 8 rows cost one warp's mma instead of eight tiles of four.
#pragma once

#include "attention_forward.cuh"

namespace finetune::attention {

// What row i of the packed rows (query, head of the group) is.
struct PackedRows {
  int first_head, group, first;

  __device__ int query(int i) const { return (first + i) / group; }
  __device__ int head(int i) const { return first_head + (first + i) % group; }
};

// Blocks are numbered (batch, kv head, tile of rows, split).
template <class T, int D, int kRules>
__global__ void __launch_bounds__(kThreads, 1) decode(AttentionCuda a) {
  using W = Warp<T, D>;
  constexpr int BLOCK_M = W::kBlockRows, BLOCK_N = W::kStep, kRows = W::kRows;
  DYN_SHARED(unsigned char, shared);
  const ForwardMemory<T, D> memory{shared};
  const W w(memory.scratch());
  const int group = static_cast<int>(a.heads / a.kv_heads), packed = static_cast<int>(a.queries) * group;
  const int splits = static_cast<int>(a.splits.count), tiles = static_cast<int>(ceil_div(packed, BLOCK_M));
  int index = blockIdx.x;
  const int split = index % splits;
  index /= splits;
  const int first = index % tiles * BLOCK_M, rows = min(packed - first, BLOCK_M);
  const int kv_head = index / tiles % static_cast<int>(a.kv_heads);
  const Sequence s = sequence(a, index / tiles / static_cast<int>(a.kv_heads), kRules);
  const PackedRows packing{kv_head * group, group, first};

  const int each = static_cast<int>(ceil_div(ceil_div(a.splits.keys, BLOCK_N), splits)) * BLOCK_N;
  const int begin = s.passed(packing.query(0)) + split * each, most_passed = s.passed(packing.query(rows - 1));
  const int least = s.limit(packing.query(0)), most = s.limit(packing.query(rows - 1));
  const auto query = [&](int r) { return packing.query(min(w.row(r), rows - 1)); };
  const auto passed = [&](int r) { return s.passed(query(r)); };
  int limit[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) limit[r] = s.limit(query(r));
  const bool chunks = in_chunks<T>(a.q, a.dim);
  const auto load_q = [&] {
    load_rows<BLOCK_M>(
        memory.q(), [&](int i) { return at<const T>(a.q, s, packing.query(i), packing.head(i)); },
        [=](int i) { return i < rows; }, a.dim, chunks);
  };
  OnlineSoftmax<kRows> softmax(a, kRules);
  typename W::template Matrix<D> acc;
  attend<T, D, kRules>(a, memory, w, s, kv_head, rows, begin, min(most, begin + each), most_passed, least, query,
                       passed, limit, load_q, softmax, acc);

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = w.row(r);
    if (i >= rows) continue;
    const int64_t row = row_index(a, s, packing.head(i), packing.query(i)), part = split * attention_rows(a) + row;
    if (w.column(0) == 0) {
      (splits == 1 ? a.m : a.splits.m)[part] = softmax.log2_max(r);
      (splits == 1 ? a.l : a.splits.l)[part] = softmax.l[r];
    }
    if (splits == 1) {
      T* const to = at<T>(a.o, s, packing.query(i), packing.head(i));
      const float factor = softmax.inverse_sum(r);
#pragma unroll
      for (int c = 0; c < acc.kColumns; ++c) {
        if (w.column(c) < a.dim) to[w.column(c)] = from_float<T>(acc.at(r, c) * factor);
      }
    } else {
      w.store_row(acc, r, a.splits.acc + part * D);
    }
  }
}

// Joins the splits of a row. A warp has a row, and of it every 32nd column.
template <class T, int D>
__global__ void __launch_bounds__(kThreads) combine(AttentionCuda a) {
  const int lane = threadIdx.x % 32;
  const int64_t rows = attention_rows(a), row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int splits = static_cast<int>(a.splits.count);
  float m = -INFINITY;
  for (int i = lane; i < splits; i += 32) m = fmaxf(m, a.splits.m[i * rows + row]);
  m = warp_max(m);
  float l = 0, acc[D / 32] = {};
  for (int i = 0; i < splits; ++i) {
    const float part = a.splits.l[i * rows + row];
    if (part == 0) continue;  // sees no key of this split
    const float weight = ptx::exp2(a.splits.m[i * rows + row] - m);
    l += weight * part;
    const float* const from = a.splits.acc + (i * rows + row) * D;
#pragma unroll
    for (int j = 0; j < D / 32; ++j) acc[j] += weight * from[32 * j + lane];
  }
  const int query = static_cast<int>(row % a.queries), head = static_cast<int>(row / a.queries % a.heads);
  T* const to = at<T>(a.o, sequence(a, static_cast<int>(row / a.queries / a.heads), false), query, head);
  const float factor = l == 0 ? 0.0f : 1 / l;
#pragma unroll
  for (int j = 0; j < D / 32; ++j) {
    if (32 * j + lane < a.dim) to[32 * j + lane] = from_float<T>(acc[j] * factor);
  }
  if (lane == 0) a.m[row] = m, a.l[row] = l;
}

}  // namespace finetune::attention
