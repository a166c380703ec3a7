// One pass of a Llama over the newest tokens of many sequences, all layers in one call; finetune/inference/native.py.
#pragma once

#include <vector>

#include "finetune/kv_cache.h"
#include "finetune/packed.h"

namespace finetune {

struct LlamaLayer {
  PackedWeight q, k, v, o, gate, up, down;
  const float *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;  // each may be null
  const float *attn_norm, *mlp_norm;                                                 // (dim,)
  const float *q_norm, *k_norm;                 // (head_dim,) of each head, before the rotary embedding; may be null
  const float *attn_post_norm, *mlp_post_norm;  // (dim,) of what is added to x; may be null
  const float *cos, *sin;                       // (positions, head_dim / 2); null: no rotary embedding
  int64_t window;                               // tokens that a token sees, itself included; 0: all
  KvPool keys, values;
};

struct LlamaModel {
  std::vector<LlamaLayer> layers;
  PackedWeight embedding, head;
  const float* norm;  // (dim,)
  int64_t dim, heads, kv_heads, head_dim, hidden;
  float eps, scale, softcap, embedding_scale, logit_softcap;
  bool gelu;   // the MLP's activation: gelu (tanh) in the place of silu
  bool exact;  // activations of products are fp32; otherwise as packed.h's Activations
  DType pool;  // f32 or bf16, where `stored` is `same`
  Stored stored;
  int64_t block_size;
};

enum class Wanted : int64_t {
  token,   // the most likely next one
  logits,  // (vocabulary,)
  state,   // (dim,) after the last norm
};

// The newest `count` tokens of one sequence. The tokens of a pass lie end to end, sequence after sequence.
struct LlamaSequence {
  int64_t start, count;  // tokens before them, which the pool holds
  int64_t blocks;        // where its block numbers begin in LlamaStep::blocks
  int64_t wanted;        // number of last tokens of which something is wanted:
  Wanted kind;
};

// Memory that stays from call to call.
struct LlamaMemory {
  std::vector<char> bytes;

  char* at_least(int64_t size) {
    if (static_cast<int64_t>(bytes.size()) < size + 64) std::vector<char>(size + size / 2 + 64).swap(bytes);
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
  }
};

struct LlamaStep {
  const LlamaModel* model;
  const int64_t* tokens;
  int64_t count;
  const LlamaSequence* sequences;
  int64_t sequence_count;
  const int32_t* blocks;
  int64_t* best;  // (rows,) of the sequences that want tokens, in order
  float* logits;  // (rows, vocabulary) of those that want logits
  float* states;  // (rows, dim) of those that want states
  LlamaMemory* memory;
  int64_t workers;
};

}  // namespace finetune
