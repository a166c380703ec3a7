// Attention of (batch, token, head, dim) tensors; the definition is finetune/ops/attention.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

struct AttentionView {  // (batch, token, head, dim): strides in elements, 1 in the last dimension
  void* data;
  int64_t batch, token, head;
};

struct AttentionMask {        // (batch or 1, queries, keys) bytes, 0 or 1: strides in bytes, 1 between keys
  const unsigned char* data;  // null: none
  int64_t batch, query;
};

struct AttentionSizes {
  DType dtype;  // of every view
  int64_t batch, queries, keys, heads, kv_heads, dim;
  float scale;
  bool causal;         // key j is visible to query i if j <= i + keys - queries
  int64_t window;      // > 0: and if it is one of the last `window` keys up to that one; not causal, of the sequence
  float softcap;       // c > 0: scores s become c tanh(s / c)
  AttentionMask mask;  // of the keys that the rules above show, a query sees those where it is 1
};

struct AttentionShape : AttentionSizes {
  const int64_t* lengths;  // (batch,) number of real keys, or null
  const int64_t* offsets;  // (documents + 1,) first token of each packed document, or null; batch is 1 then
  int64_t documents;
  float* scratch;   // (workers, *_scratch()), 64-byte aligned
  int64_t workers;  // threads that may run at once; the result does not depend on it

  int64_t sequences() const { return offsets ? documents : batch; }
};

struct Attention : AttentionShape {
  AttentionView q, k, v, o;
  // (batch, heads, queries), kept for the backward pass: with s_j = scale · log2(e) · q·k_j, top = max s_j and
  // total = Σ 2^(s_j − top) over the visible keys; -inf and 0 where there are none. Their sum top + log2(total) would
  // lose as many bits as the scores are large, and the backward pass takes 2 to that power.
  float *top, *total;
};

struct AttentionBackward : AttentionShape {
  AttentionView q, k, v, o, grad_o, dq, dk, dv;
  const float *top, *total;
  int64_t longest;  // keys of the longest sequence
  int64_t parts;    // the rows of a (sequence, kv head) are dealt out to so many tasks: attention_parts()
  float* partial;   // attention_partial() floats: dk and dv of each part, if there are several
};

// --- CUDA

struct Integers {  // a device array of int64 (`wide`) or int32, or null
  const void* data;
  bool wide;
};

struct AttentionCudaShape : AttentionSizes {
  Integers lengths, offsets;  // as above, wherever they were made: the host never waits for them
  int64_t documents;
};

// The keys of a decoding step are split over blocks (csrc/cuda/attention_decode.cuh). Rows are (batch, heads, queries).
struct AttentionSplits {
  int64_t count;       // attention_splits(); 0: another kernel's work
  int64_t keys;        // attention_span(): how many are split, from the first that the first query sees
  float *m, *l, *acc;  // scratch where count > 1: (count, rows), (count, rows), (count, rows, attention_tile_dim())
};

struct AttentionCuda : AttentionCudaShape {
  AttentionView q, k, v, o;
  float *m, *l;  // top and total above, by the papers' names
  AttentionSplits splits;
};

// What the backward pass needs of a row: dS_j = P_j (dP_j - delta), P_j = 2^(s_j - m) · inverse_l.
struct alignas(16) AttentionRow {
  float m, inverse_l, delta, unused;
};

struct AttentionBackwardCuda : AttentionCudaShape {
  AttentionView q, k, v, o, grad_o, dq, dk, dv;
  const float *m, *l;
  AttentionRow* rows;  // scratch, (batch, heads, queries)
};

constexpr int64_t kAttentionCudaDim = 256;  // the largest head dim of the CUDA kernels

// Head dims of their tiles: the others are padded with zeros.
constexpr int64_t attention_tile_dim(int64_t dim) { return dim <= 32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

// A decoding step has at most this many rows (queries of the heads that share a key/value head). Its keys are split, 256
// at least to a block, until there are 264 blocks: two for each multiprocessor of an H100. That number does not follow
// the device: it would change the order of sums, and with it bits.
constexpr int64_t kAttentionDecodeRows = 64, kAttentionDecodeBlocks = 2 * 132, kAttentionSplitKeys = 256;

// The most keys that the queries of a sequence see together.
constexpr int64_t attention_span(const AttentionSizes& a) {
  if (!a.window || a.window >= a.keys) return a.keys;
  const int64_t seen = a.window + (a.causal ? a.queries - 1 : 0);
  return seen < a.keys ? seen : a.keys;
}

// Blocks over which the keys of a row are split; 0 where this is no decoding step, or has nothing to gain as one.
constexpr int64_t attention_splits(const AttentionSizes& a, bool documents) {
  const int64_t group = a.heads / a.kv_heads, pairs = a.batch * a.kv_heads;
  if (documents || !pairs || !a.keys || !a.queries || a.queries * group > kAttentionDecodeRows) return 0;
  const int64_t most = (attention_span(a) + kAttentionSplitKeys - 1) / kAttentionSplitKeys;
  const int64_t wanted = kAttentionDecodeBlocks / pairs, splits = wanted < 1 ? 1 : wanted < most ? wanted : most;
  return splits > 1 || group > 1 ? splits : 0;
}

// --- CPU

// Block sizes, at every level. A strip is the queries that one set of vectors holds.
constexpr int64_t kAttentionRows = 128, kAttentionBackwardRows = 64, kAttentionKeys = 64, kAttentionMaxStrip = 32;

// Floats of scratch a worker needs: a few blocks, and in the backward pass fp32 sums for dk and dv.
constexpr int64_t attention_scratch(int64_t dim) {
  const int64_t padded = dim + 32;
  return 2 * kAttentionRows * padded + 2 * kAttentionKeys * padded + kAttentionKeys * kAttentionMaxStrip +
         4 * kAttentionRows;
}
constexpr int64_t attention_backward_scratch(int64_t dim, int64_t keys, int64_t parts) {
  const int64_t padded = dim + 32;
  return 5 * kAttentionBackwardRows * padded + 2 * kAttentionKeys * padded +
         2 * kAttentionKeys * (kAttentionBackwardRows + 32) + 4 * kAttentionBackwardRows +
         (parts > 1 ? 0 : 2 * keys * padded);
}
// Enough tasks for a few threads where there are few (sequence, kv head) pairs; a function of the shape alone, since
// the order of the sums in dk and dv depends on it.
constexpr int64_t attention_parts(int64_t pairs, int64_t rows) {
  const int64_t wanted = pairs >= 8 ? 1 : (8 + pairs - 1) / (pairs > 0 ? pairs : 1);
  const int64_t most = (rows + kAttentionBackwardRows - 1) / kAttentionBackwardRows;
  return wanted < most ? wanted : (most > 0 ? most : 1);
}
constexpr int64_t attention_partial(int64_t parts, int64_t kv_heads, int64_t tokens, int64_t dim) {
  return parts > 1 ? 2 * parts * kv_heads * tokens * (dim + 32) : 0;
}

}  // namespace finetune
