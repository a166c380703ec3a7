// The paged key–value cache; the definition is finetune/ops/kv_cache.py.
#pragma once

#include "finetune/kernel.h"

namespace finetune {

enum class Stored : int { same, int8, fp8 };  // as the tokens, or 8 bits (fp8: e4m3) with fp32 scales
constexpr float kLargestInt8 = 127.0f, kLargestFp8 = 448.0f;

struct KvPool {                // the blocks of one layer's keys or values
  void* data;                  // (blocks, block_size, kv_heads, dim), contiguous but for the blocks
  float* scale;                // (blocks, block_size, kv_heads) where stored in 8 bits, else null
  int64_t block, scale_block;  // elements from one block to the next
};

struct KvAppend {
  DType dtype;  // of k and v
  Stored stored;
  const void *k, *v;                         // (tokens, kv_heads, dim), 1 between the elements of a head
  int64_t k_token, k_head, v_token, v_head;  // strides
  KvPool to_k, to_v;
  const int64_t* slots;  // (tokens,) block · block_size + offset; what is not in [0, blocks · block_size) is skipped
  int64_t tokens, kv_heads, dim, blocks, block_size;
};

struct KvGather {
  DType dtype;  // of out
  Stored stored;
  KvPool from;
  const int32_t* table;    // (batch, width) block numbers
  const int32_t* lengths;  // (batch,)
  void* out;               // (batch, width · block_size, kv_heads, dim)
  int64_t batch, width, block_size, kv_heads, dim;
};

struct KvCopy {
  static constexpr int most = 64;  // pools of one launch
  char* data[most];
  int64_t stride[most], bytes[most];  // from one block to the next, and of a block
  int pools;
  const int64_t* pairs;  // (count, 2) source and destination
  int64_t count;
};

}  // namespace finetune
