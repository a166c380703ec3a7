// A Llama as a handle that keeps its tensors alive, and one pass of it. finetune/inference/native.py writes what `Reader`
// reads, and checks the model; the plan of a pass is checked here, since its numbers are addresses.
#include "finetune/llama_step.h"

#include <map>
#include <memory>
#include <mutex>

#include "kv_pool.h"

namespace finetune {
namespace {

constexpr const char* kName = "llama_step";

struct Handle {
  LlamaModel model;
  int64_t blocks = 0, positions = 0;  // of the pool; of the rotary tables
  std::vector<Tensor> tensors;
  LlamaMemory memory;
};

std::mutex running;  // one pass at a time: two would wait for each other's threads
std::map<int64_t, std::shared_ptr<Handle>> handles;
int64_t last_handle = 0;

// The tensors and numbers of a model, in the order in which native.py wrote them.
struct Reader {
  const std::vector<Tensor>& tensors;
  const int64_t* numbers;
  int64_t count;
  size_t tensor = 0;
  int64_t at = 0;

  int64_t number() {
    check(at < count, kName, "the model has too few numbers");
    return numbers[at++];
  }
  const Tensor& next() {
    check(tensor < tensors.size(), kName, "the model has too few tensors");
    return tensors[tensor++];
  }
  const float* floats(int64_t size) {
    const Tensor& t = next();
    check(t.numel() == size, kName, "a vector has another size");
    return in<float>(t);
  }
  const float* maybe_floats(int64_t size) { return number() ? floats(size) : nullptr; }

  PackedWeight weight(int64_t rows, int64_t depth) {
    PackedWeight w{};
    w.format = static_cast<WeightFormat>(number());
    w.rows = rows, w.depth = depth;
    w.group = number();
    const bool scaled = w.format != WeightFormat::fp32 && w.format != WeightFormat::bf16, minima = number();
    check(w.group >= 0 && (!w.group || w.padded() % w.group == 0), kName, "a group does not divide the depth");
    const auto bytes = [&](int64_t wanted) {
      const Tensor& t = next();
      check(t.is_contiguous() && t.numel() * static_cast<int64_t>(t.element_size()) == wanted, kName,
            "a packed weight has another size");
      return in(t);
    };
    w.codes = bytes(w.panels() * w.words() * kPanel * 4);
    if (scaled) {
      const int64_t scales = w.panels() * w.groups() * kPanel;
      w.half_scales = tensors.at(tensor).scalar_type() == ScalarType::Half;
      w.scale = bytes(scales * (w.half_scales ? 2 : 4));
      if (minima) w.minimum = bytes(scales * (w.half_scales ? 2 : 4));
    }
    return w;
  }

  KvPool pool(Handle& h, bool scaled) {
    const Tensor& data = next();
    const OptionalTensor scale = scaled ? OptionalTensor(next()) : std::nullopt;
    check(data.dim() == 4 && data.size(1) == h.model.block_size && data.size(2) == h.model.kv_heads &&
              data.size(3) == h.model.head_dim && stored_as(data) == h.model.stored,
          kName, "a pool has another shape or type");
    h.blocks = data.size(0);
    return pool_of(kName, data, scale, true);
  }
};

int64_t llama_model(std::vector<Tensor> tensors, const Tensor& numbers, const Tensor& factors_) {
  auto handle = std::make_shared<Handle>();
  LlamaModel& m = handle->model;
  Reader read{tensors, in<int64_t>(numbers), numbers.numel()};
  check(factors_.numel() == 5, kName, "a model has five factors");
  const float* factors = in<float>(factors_);
  m.eps = factors[0], m.scale = factors[1], m.softcap = factors[2];
  m.embedding_scale = factors[3], m.logit_softcap = factors[4];
  const int64_t layers = read.number(), vocabulary = read.number();
  m.dim = read.number(), m.heads = read.number(), m.kv_heads = read.number(), m.head_dim = read.number();
  m.hidden = read.number(), m.block_size = read.number();
  m.gelu = read.number(), m.exact = read.number();
  m.stored = static_cast<Stored>(read.number());
  m.pool = read.number() ? DType::bf16 : DType::f32;
  check(layers > 0 && m.dim > 0 && m.kv_heads > 0 && m.heads % m.kv_heads == 0 && m.head_dim % 2 == 0 && m.hidden > 0 &&
            m.block_size > 0 && vocabulary > 0,
        kName, "a size of the model is out of range");
  handle->positions = read.number();
  m.embedding = read.weight(vocabulary, m.dim);
  m.head = read.weight(vocabulary, m.dim);
  m.norm = read.floats(m.dim);
  for (int64_t i = 0; i < layers; ++i) {
    LlamaLayer layer{};
    const int64_t heads = m.heads * m.head_dim, kv_heads = m.kv_heads * m.head_dim;
    const auto linear = [&](PackedWeight& weight, const float*& bias, int64_t rows, int64_t depth) {
      weight = read.weight(rows, depth);
      bias = read.maybe_floats(rows);
    };
    linear(layer.q, layer.q_bias, heads, m.dim);
    linear(layer.k, layer.k_bias, kv_heads, m.dim);
    linear(layer.v, layer.v_bias, kv_heads, m.dim);
    linear(layer.o, layer.o_bias, m.dim, heads);
    linear(layer.gate, layer.gate_bias, m.hidden, m.dim);
    linear(layer.up, layer.up_bias, m.hidden, m.dim);
    linear(layer.down, layer.down_bias, m.dim, m.hidden);
    layer.attn_norm = read.floats(m.dim), layer.mlp_norm = read.floats(m.dim);
    layer.q_norm = read.maybe_floats(m.head_dim), layer.k_norm = read.maybe_floats(m.head_dim);
    layer.attn_post_norm = read.maybe_floats(m.dim), layer.mlp_post_norm = read.maybe_floats(m.dim);
    if (read.number()) {
      layer.cos = read.floats(handle->positions * m.head_dim / 2);
      layer.sin = read.floats(handle->positions * m.head_dim / 2);
    }
    layer.window = read.number();
    layer.keys = read.pool(*handle, m.stored != Stored::same);
    layer.values = read.pool(*handle, m.stored != Stored::same);
    m.layers.push_back(layer);
  }
  check(read.at == numbers.numel() && read.tensor == tensors.size(), kName, "the model has more than was read");
  handle->tensors = std::move(tensors);
  const std::lock_guard<std::mutex> lock(running);
  handles[++last_handle] = handle;
  return last_handle;
}

void llama_free(int64_t model) {
  const std::lock_guard<std::mutex> lock(running);
  handles.erase(model);
}

std::tuple<Tensor, Tensor, Tensor> llama_step(int64_t model, const Tensor& tokens, const Tensor& sequences,
                                              const Tensor& blocks) {
  const std::lock_guard<std::mutex> lock(running);
  const auto found = handles.find(model);
  check(found != handles.end(), kName, "there is no such model");
  Handle& handle = *found->second;
  const LlamaModel& m = handle.model;
  static_assert(sizeof(LlamaSequence) == 5 * sizeof(int64_t));
  check(sequences.dim() == 2 && sequences.size(1) == 5, kName, "a sequence is five numbers");
  const int64_t count = sequences.size(0), *numbers = in<int64_t>(sequences), *ids = in<int64_t>(tokens);
  const int32_t* table = in<int32_t>(blocks);
  std::vector<LlamaSequence> plan(count);
  int64_t n = 0, places[3] = {0, 0, 0};
  for (int64_t s = 0; s < count; ++s, numbers += 5) {
    LlamaSequence& one = plan[s] = {numbers[0], numbers[1], numbers[2], numbers[3], static_cast<Wanted>(numbers[4])};
    const int64_t end = one.start + one.count, used = (end + m.block_size - 1) / m.block_size;
    check(one.start >= 0 && one.count > 0 && end <= handle.positions, kName, "a position has no rotary embedding");
    check(one.blocks >= 0 && one.blocks + used <= blocks.numel(), kName, "a sequence has too few blocks");
    for (int64_t i = 0; i < used; ++i) {
      check(table[one.blocks + i] >= 0 && table[one.blocks + i] < handle.blocks, kName,
            "a block is outside of the pool");
    }
    check(one.wanted >= 0 && one.wanted <= one.count, kName, "more rows are wanted than there are");
    check(numbers[4] >= 0 && numbers[4] < 3, kName, "what is wanted is a token, logits or a state");
    places[numbers[4]] += one.wanted;
    n += one.count;
  }
  check(n == tokens.numel(), kName, "the sequences do not have as many tokens as there are");
  for (int64_t i = 0; i < n; ++i)
    check(ids[i] >= 0 && ids[i] < m.embedding.rows, kName, "a token is not in the vocabulary");
  Tensor best = torch::stable::new_empty(tokens, {places[0]}), logits = empty_f32(tokens, {places[1], m.head.rows}),
         states = empty_f32(tokens, {places[2], m.dim});
  const LlamaStep args{&m,
                       ids,
                       n,
                       plan.data(),
                       count,
                       table,
                       out<int64_t>(best),
                       out<float>(logits),
                       out<float>(states),
                       &handle.memory,
                       threads()};
  run(kName, args);
  return {best, logits, states};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def("llama_model(Tensor[] tensors, Tensor numbers, Tensor factors) -> int");
  m.def("llama_free(int model) -> ()");
  m.def(
      "llama_step(int model, Tensor tokens, Tensor sequences, Tensor blocks) -> (Tensor best, Tensor logits, Tensor "
      "states)");
}
FINETUNE_KERNELS(m) {
  FINETUNE_KERNEL(m, "llama_model", llama_model);
  FINETUNE_KERNEL(m, "llama_step", llama_step);
}
STABLE_TORCH_LIBRARY_IMPL(finetune, CompositeExplicitAutograd, m) { m.impl("llama_free", TORCH_BOX(&llama_free)); }

}  // namespace finetune
