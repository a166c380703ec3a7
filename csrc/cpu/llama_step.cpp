// One pass of a Llama over the newest tokens of many sequences: all layers in one parallel region.
//
//     x = embedding[token]                                                             fp32 until the end
//     q, k, v = W (norm x) + b, norms and rotary embedding of the heads, k and v into the pool
//     x += W_o attention + b                       the residual is the product's epilogue
//     h = silu(W_gate y + b) · (W_up y + b), y = norm x        so is the activation
//     x += W_down h + b
//     the most likely token: each thread keeps the best of its rows of the head, logits are stored only where wanted
//
// Products: csrc/cpu/packed_product.h; attention: csrc/cpu/paged_attention.h. A token's bits depend on its own sequence
// alone: every row is computed by the same operations in the same order however many there are, on any thread.
//
// Bytes of one token of SmolLM2-135M (106 M weights in layers, 28 M in the head): 269 MB in bf16, 136 MB in int8, 95 MB
// in int4 with the head in int8, and 23 KB of the pool for each token before it (bf16). FLOPs: 2 a weight. One to eight
// rows read the weights once: memory bandwidth is the roof. From about 16 rows on the products are. On two cores of an
// EPYC (Zen 5) what is reached of that limit, and the limit itself, stand in benches/results/decode.
// A token goes through about 6 phases a layer, each of which costs some tenths of a microsecond (team.h).
#include "finetune/llama_step.h"

#include "packed_product.h"
#include "paged_attention.h"
#include "store_head.h"
#include "team.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int64_t kAlone = 2;      // rows that every thread prepares for itself, in the place of a phase for it
constexpr int64_t kQueries = 32;   // of a sequence that one task attends for
constexpr int64_t kManyRows = 64;  // from here on threads take products in their smallest units
constexpr int64_t kLayerPhases = 20, kOtherPhases = 8;  // of the team, at most

int64_t lanes_of(const PackedWeight& w) { return w.panels() * kPanel; }

struct QueryBlock {  // neighboring tokens of one sequence, which attention takes together
  int64_t token;     // the first, counted in the pass
  int64_t queries;
  int32_t length;  // of the sequence up to the last of them
  const int32_t* table;
  int64_t pieces, first_slice;  // slices: places for a piece's result, where pieces are attended to by several threads
};

struct WantedRow {
  int64_t token;
  int64_t place;  // in the result of that kind
  Wanted kind;
};

// The largest logit of each lane of a panel, and the panel that it is in.
struct Best {
  float value[kPanel];
  int32_t panel[kPanel];
};

struct Shape {  // what lies where, in elements
  int64_t q, k, v, qkv, attended, x, hidden, head;

  explicit Shape(const LlamaModel& m)
      : q(0),
        k(lanes_of(m.layers[0].q)),
        v(k + lanes_of(m.layers[0].k)),
        qkv(v + lanes_of(m.layers[0].v)),
        attended(m.heads * m.head_dim),
        x(round_up(m.dim, kPanel)),
        hidden(round_up(m.hidden, kPanel)),
        head(lanes_of(m.head)) {}
};

struct Carve {  // pieces of one memory; with a null `free` it only counts
  char* free;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    char* const piece = free + used;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return free ? reinterpret_cast<T*>(piece) : nullptr;
  }
};

struct Pass {
  const LlamaStep& a;
  const LlamaModel& m;
  const Shape at;
  int64_t rows = 0, states = 0, block_count = 0, slices = 0, most_pieces = 1;
  bool split = false;  // pieces of one sequence's keys are attended to by several threads

  int64_t* positions;
  int64_t* slots;
  QueryBlock* blocks;
  WantedRow* wanted;  // `rows` that the head is computed for, then `states`
  float *x, *branch, *qkv, *attended, *lse, *hidden, *sums, *tops;
  char* prepared_rows;
  Best* best;
  int32_t* pieces_done;  // a layer, block and kv head, where `split`
  bool decoding = true;  // each sequence has one token
  struct Own {
    char* prepared;
    float *row, *attention, *sums, *tops;
  };
  Own* own;  // a worker
  Team team;

  explicit Pass(const LlamaStep& step) : a(step), m(*step.model), at(*step.model), team{step.workers, nullptr} {}
};

int64_t widest(const LlamaModel& m) {
  int64_t most = m.dim > m.hidden ? m.dim : m.hidden;
  return most > m.heads * m.head_dim ? most : m.heads * m.head_dim;
}

// Counts what the plan needs, and lays it out.
void lay_out(Pass& p) {
  const LlamaStep& a = p.a;
  const LlamaModel& m = p.m;
  for (int64_t s = 0; s < a.sequence_count; ++s) {
    const LlamaSequence& one = a.sequences[s];
    (one.kind == Wanted::state ? p.states : p.rows) += one.wanted;
    p.block_count += (one.count + kQueries - 1) / kQueries;
    p.decoding = p.decoding && one.count == 1;
    const int64_t pieces = (one.start + one.count + PagedAttention::piece - 1) / PagedAttention::piece;
    p.most_pieces = pieces > p.most_pieces ? pieces : p.most_pieces;
  }
  p.split = p.most_pieces > 1 && p.block_count * m.kv_heads < 4 * a.workers;
  for (int64_t s = 0; s < a.sequence_count; ++s) {
    const LlamaSequence& one = a.sequences[s];
    for (int64_t i = 0; i < one.count; i += kQueries) {
      const int64_t queries = smaller(kQueries, one.count - i), length = one.start + i + queries;
      p.slices += p.split ? queries * m.heads * ((length + PagedAttention::piece - 1) / PagedAttention::piece) : 0;
    }
  }
  const auto carve = [&](char* memory) {
    Carve c{memory};
    const int64_t n = a.count, layers = static_cast<int64_t>(m.layers.size()), group = m.heads / m.kv_heads;
    p.positions = c.take<int64_t>(n);
    p.slots = c.take<int64_t>(n);
    p.blocks = c.take<QueryBlock>(p.block_count);
    p.wanted = c.take<WantedRow>(p.rows + p.states);
    p.team.phases = c.take<Phase>(layers * kLayerPhases + kOtherPhases);
    p.pieces_done = c.take<int32_t>(p.split ? layers * p.block_count * m.kv_heads : 0);
    p.x = c.take<float>(n * p.at.x);
    p.branch = c.take<float>(n * p.at.x);
    p.qkv = c.take<float>(n * p.at.qkv);
    p.attended = c.take<float>(n * p.at.attended);
    p.lse = c.take<float>(n * m.heads);
    p.hidden = c.take<float>(n * p.at.hidden);
    p.sums = c.take<float>(p.slices * m.head_dim);
    p.tops = c.take<float>(p.slices * 2);
    p.prepared_rows = c.take<char>(prepared_bytes(n, widest(m)));
    p.best = c.take<Best>(a.workers * p.rows);
    p.own = c.take<Pass::Own>(a.workers);
    for (int64_t w = 0; w < a.workers; ++w) {
      Pass::Own own;
      own.prepared = c.take<char>(prepared_bytes(kAlone, widest(m)));
      own.row = c.take<float>(round_up(widest(m), kPanel));
      own.attention = c.take<float>(paged_attention_scratch(kQueries * group, m.head_dim));
      const int64_t part = p.split || p.most_pieces == 1 ? 0 : kQueries * m.heads * p.most_pieces;
      own.sums = c.take<float>(part * m.head_dim);
      own.tops = c.take<float>(part * 2);
      if (memory) p.own[w] = own;
    }
    return c.used;
  };
  carve(a.memory->at_least(carve(nullptr)));
}

void read_plan(Pass& p) {
  const LlamaStep& a = p.a;
  const LlamaModel& m = p.m;
  int64_t token = 0, block = 0, row = 0, slice = 0, state = p.rows, places[3] = {0, 0, 0};
  for (int64_t s = 0; s < a.sequence_count; ++s) {
    const LlamaSequence& one = a.sequences[s];
    const int32_t* table = a.blocks + one.blocks;
    for (int64_t i = 0; i < one.count; ++i) {
      const int64_t position = one.start + i;
      p.positions[token + i] = position;
      p.slots[token + i] = table[position / m.block_size] * m.block_size + position % m.block_size;
    }
    for (int64_t i = 0; i < one.count; i += kQueries) {
      const int64_t queries = smaller(kQueries, one.count - i), length = one.start + i + queries;
      const int64_t pieces = (length + PagedAttention::piece - 1) / PagedAttention::piece;
      p.blocks[block++] = {token + i, queries, static_cast<int32_t>(length), table, pieces, slice};
      slice += p.split ? queries * m.heads * pieces : 0;
    }
    for (int64_t i = one.count - one.wanted; i < one.count; ++i) {
      p.wanted[one.kind == Wanted::state ? state++ : row++] = {token + i, places[static_cast<int>(one.kind)]++,
                                                               one.kind};
    }
    token += one.count;
  }
  const int64_t layers = static_cast<int64_t>(m.layers.size());
  std::memset(p.team.phases, 0, (layers * kLayerPhases + kOtherPhases) * sizeof(Phase));
  for (int64_t r = 0; r < a.workers * p.rows; ++r) {
    for (int64_t i = 0; i < kPanel; ++i) p.best[r].value[i] = -__builtin_inff(), p.best[r].panel[i] = 0;
  }
  if (p.split) std::memset(p.pieces_done, 0, layers * p.block_count * m.kv_heads * sizeof(int32_t));
}

// --- what happens to one row

// y = x / rms(x) · weight, as csrc/cpu/rms_norm.cpp has it. y may be x.
FINETUNE_INLINE void rms_norm_row(const float* x, const float* weight, float eps, int64_t dim, float* y) {
  float squares[1];
  sum_vectors(dim, squares, [&](vf* total, int64_t i, auto get) { total[0] += get(x + i) * get(x + i); });
  const float rstd = 1.0f / __builtin_sqrtf(squares[0] / static_cast<float>(dim) + eps);
  for_each_vector(dim, [&](int64_t i, auto get, auto put) { put(y + i, get(x + i) * rstd * get(weight + i)); });
}

FINETUNE_INLINE void rotate_head(float* x, const float* cos, const float* sin, int64_t half) {
  for_each_vector(half, [&](int64_t i, auto get, auto put) {
    const vf x1 = get(x + i), x2 = get(x + half + i), c = get(cos + i), s = get(sin + i);
    put(x + i, x1 * c - x2 * s);
    put(x + half + i, x2 * c + x1 * s);
  });
}

// The row `index` of a packed table.
void unpack_row(const PackedWeight& w, int64_t index, float* out) {
  const int64_t panel = index / kPanel, lane = index % kPanel;
  const auto* codes = static_cast<const uint32_t*>(w.codes) + panel * w.words() * kPanel + lane;
  const int64_t groups = w.groups(), group = w.group ? w.group : w.padded();
  const auto of = [&](const void* values, int64_t g) {
    const int64_t i = (panel * groups + g) * kPanel + lane;
    return w.half_scales ? half_to_float(static_cast<const uint16_t*>(values)[i])
                         : static_cast<const float*>(values)[i];
  };
  for (int64_t k = 0; k < w.depth; ++k) {
    if (w.format == WeightFormat::fp32) {
      std::memcpy(out + k, codes + k * kPanel, sizeof(float));
      continue;
    }
    if (w.format == WeightFormat::bf16) {
      const uint32_t bits = k % 2 ? codes[k / 2 * kPanel] & 0xffff0000u : codes[k / 2 * kPanel] << 16;
      std::memcpy(out + k, &bits, sizeof bits);
      continue;
    }
    const float scale = of(w.scale, k / group);
    if (w.format == WeightFormat::int8) {
      out[k] = scale * static_cast<float>(static_cast<int32_t>(codes[k / 4 * kPanel] >> (8 * (k % 4)) & 255u) - 128);
      continue;
    }
    const uint32_t code = codes[k / 8 * kPanel] >> (8 * (k % 4) + 4 * (k / 4 % 2)) & 15u;
    if (w.format == WeightFormat::nf4) {
      out[k] = scale * kNf4[code];
    } else {
      out[k] = static_cast<float>(code) * scale + (w.minimum ? of(w.minimum, k / group) : -8.0f * scale);
    }
  }
}

// --- epilogues: what becomes of 16 results of a product

struct Epilogue {
  enum Kind { set, add, gate, up, choose } kind;
  bool gelu = false;
  float* to = nullptr;  // (rows, ld)
  int64_t ld = 0;
  const float* bias = nullptr;
  int64_t lanes = 0;  // of `bias`, and of the head's vocabulary
  const WantedRow* wanted = nullptr;
  Best* best = nullptr;
  float* logits = nullptr;
  float cap = 0;

  FINETUNE_INLINE void operator()(int64_t panel, int64_t row, const float* y) const {
    if (kind == choose) return head(panel, row, y);
    float* out = to + row * ld + panel * kPanel;
    for (int64_t i = 0; i < kPanel; i += kLanes) {
      vf value = load(y + i);
      if (bias) {
        const int64_t left = lanes - panel * kPanel - i;
        if (left > 0)
          value += left >= kLanes ? load(bias + panel * kPanel + i) : load_part(bias + panel * kPanel + i, left);
      }
      if (kind == add) value += load(out + i);
      if (kind == up) value *= load(out + i);
      if (kind == gate) value = active(value);
      store(out + i, value);
    }
  }

 private:
  FINETUNE_INLINE vf active(vf x) const {
    if (gelu) return x * (1.0f / (1.0f + vexp(x * (x * x * -0.0713548163f - 1.5957691216f))));
    return x * (1.0f / (1.0f + vexp(-x)));
  }

  FINETUNE_INLINE void head(int64_t panel, int64_t row, const float* y) const {
    const WantedRow& one = wanted[row];
    const int64_t left = lanes - panel * kPanel;
    if (one.kind == Wanted::logits) {
      float* out = logits + one.place * lanes + panel * kPanel;
      const int64_t n = left < kPanel ? left : kPanel;
      for_each_vector(n, [&](int64_t i, auto get, auto put) {
        put(out + i, cap > 0 ? vtanh(get(y + i) * (1.0f / cap)) * cap : get(y + i));
      });
      return;
    }
    Best& b = best[row];
    for (int64_t i = 0; i < kPanel; i += kLanes) {
      vi inside{};
      for (int64_t j = 0; j < kLanes; ++j) inside[j] = i + j < left ? -1 : 0;
      const vf value = load(y + i), most = load(b.value + i);
      const vi larger = (vi)(value > most) & inside;
      store(b.value + i, select(larger, value, most));
      vi panels = load_int(b.panel + i);
      panels = (larger & (vi{} + static_cast<int32_t>(panel))) | (~larger & panels);
      std::memcpy(b.panel + i, &panels, sizeof panels);
    }
  }
};

// --- the phases, as one worker goes through them

struct Worker {
  Pass& p;
  const int64_t id;
  const LlamaModel& m;
  Pass::Own& own;
  int64_t phase = 0;

  Worker(Pass& pass, int64_t worker) : p(pass), id(worker), m(pass.m), own(pass.own[worker]) {}

  // body(first, last) for this worker's parts of the units; when it returns all units are done. What must not be done
  // twice, or reads what a later phase writes, stands in `body`.
  template <class Body>
  void each(int64_t units, Body&& body) {
    p.team.each(phase++, units, 2, body);
  }
  template <class Body>
  void each_single(int64_t units, Body&& body) {
    p.team.each(phase++, units, Team::kSingle, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) body(i);
    });
  }

  // Products with the panels of several weights of one kind, as if they were one, with the same `n` rows: source(row,
  // buffer) gives the activations of a row, and may use the buffer. body(x, which weight, its panels first … last).
  template <class Source, class Body>
  void panels(const PackedWeight* const* w, int64_t number, int64_t n, Source&& source, Body&& body) {
    const bool alone = n <= kAlone;
    const Prepared to = prepared(*w[0], n, m.exact, alone ? own.prepared : p.prepared_rows);
    const auto prepare_rows = [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        Prepared one = to;
        one.data += r * to.row;
        prepare(*w[0], source(r, own.row), 0, 0, 1, one);
      }
    };
    if (!alone) each(n, prepare_rows);
    int64_t all = 0;
    for (int64_t i = 0; i < number; ++i) all += w[i]->panels();
    bool ready = !alone;
    const int64_t unit = n > 4 ? 2 : 1;  // panels that product() takes at once
    const int64_t parts = n >= kManyRows ? Team::kSingle : 2 * unit;
    p.team.each(phase++, (all + unit - 1) / unit, parts, [&](int64_t first_unit, int64_t last_unit) {
      if (!ready) prepare_rows(0, n), ready = true;
      const int64_t first = first_unit * unit, last = smaller(last_unit * unit, all);
      for (int64_t i = 0, begin = 0; i < number; begin += w[i++]->panels()) {
        const int64_t from = first > begin ? first - begin : 0, end = smaller(last - begin, w[i]->panels());
        if (from < end) body(to, i, from, end);
      }
    });
  }

  static bool alike(const PackedWeight& a, const PackedWeight& b) {
    return a.format == b.format && a.group == b.group && !a.minimum == !b.minimum;
  }

  // Products of several weights with the same rows, which are prepared again where formats differ.
  template <class Source>
  void products(std::initializer_list<const PackedWeight*> weights, int64_t n, Source&& source, const Epilogue* to) {
    const PackedWeight* const* w = weights.begin();
    const int64_t number = static_cast<int64_t>(weights.size());
    for (int64_t i = 0, end; i < number; i = end) {
      for (end = i + 1; end < number && alike(*w[i], *w[end]);) ++end;
      panels(w + i, end - i, n, source, [&](const Prepared& x, int64_t which, int64_t first, int64_t last) {
        product(*w[i + which], x, n, first, last, to[i + which]);
      });
    }
  }

  void embed() {
    each(p.a.count, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        float* x = p.x + t * p.at.x;
        unpack_row(m.embedding, p.a.tokens[t], x);
        if (m.embedding_scale != 1) {
          for_each_vector(m.dim, [&](int64_t i, auto get, auto put) { put(x + i, get(x + i) * m.embedding_scale); });
        }
      }
    });
  }

  // x after what `branch` adds to it, where that has a norm.
  void join_branch(const float* post_norm) {
    if (!post_norm) return;
    each(p.a.count, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        float *x = p.x + r * p.at.x, *y = p.branch + r * p.at.x;
        rms_norm_row(y, post_norm, m.eps, m.dim, y);
        for_each_vector(m.dim, [&](int64_t i, auto get, auto put) { put(x + i, get(x + i) + get(y + i)); });
      }
    });
  }

  Epilogue into_x(const float* bias, const float* post_norm) const {
    return {.kind = post_norm ? Epilogue::set : Epilogue::add,
            .to = post_norm ? p.branch : p.x,
            .ld = p.at.x,
            .bias = bias,
            .lanes = m.dim};
  }

  // The heads that share a kv head, of one token: queries and key are normed and rotated, key and value stored.
  template <class C>
  void store_head_of(const LlamaLayer& layer, int64_t t, int64_t h) {
    const int64_t group = m.heads / m.kv_heads, dim = m.head_dim;
    float* const row = p.qkv + t * p.at.qkv;
    const int64_t from = p.positions[t] * (dim / 2);
    const auto turn = [&](float* x, const float* weight) {
      if (weight) rms_norm_row(x, weight, m.eps, dim, x);
      if (layer.cos) rotate_head(x, layer.cos + from, layer.sin + from, dim / 2);
    };
    for (int64_t j = 0; j < group; ++j) turn(row + p.at.q + (h * group + j) * dim, layer.q_norm);
    turn(row + p.at.k + h * dim, layer.k_norm);
    const int64_t block = p.slots[t] / m.block_size, place = p.slots[t] % m.block_size * m.kv_heads + h;
    const auto put_in = [&](const KvPool& pool, const float* x) {
      store_head(x, static_cast<C*>(pool.data) + block * pool.block + place * dim,
                 pool.scale ? pool.scale + block * pool.scale_block + place : nullptr, dim);
    };
    put_in(layer.keys, row + p.at.k + h * dim);
    put_in(layer.values, row + p.at.v + h * dim);
  }

  template <class C>
  void attend_layer(const LlamaLayer& layer, int64_t index) {
    const int64_t heads = p.block_count * m.kv_heads;
    const bool together = p.decoding && !p.split;  // the task of a head is the only one that needs its new key
    if (!together) {
      each(p.a.count * m.kv_heads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) store_head_of<C>(layer, i / m.kv_heads, i % m.kv_heads);
      });
    }
    each_single(heads * (p.split ? p.most_pieces : 1), [&](int64_t task) {
      const int64_t piece = task / heads, kv_head = task % m.kv_heads;
      const QueryBlock& block = p.blocks[task % heads / m.kv_heads];
      if (piece >= block.pieces) return;
      if (together) store_head_of<C>(layer, block.token, kv_head);
      PagedAttention b{};
      b.dtype = DType::f32;
      b.stored = m.stored;
      b.q = p.qkv + block.token * p.at.qkv + p.at.q;
      b.q_query = p.at.qkv;
      b.q_head = m.head_dim;
      b.k = layer.keys;
      b.v = layer.values;
      b.table = block.table;
      b.lengths = &block.length;
      b.out = p.attended + block.token * p.at.attended;
      b.lse = p.lse + block.token * m.heads;
      b.sums = p.split ? p.sums + block.first_slice * m.head_dim : own.sums;
      b.tops = p.split ? p.tops + block.first_slice * 2 : own.tops;
      b.batch = 1;
      b.queries = block.queries;
      b.heads = m.heads;
      b.kv_heads = m.kv_heads;
      b.dim = m.head_dim;
      b.block_size = m.block_size;
      b.width = (block.length + m.block_size - 1) / m.block_size;
      b.pieces = block.pieces;
      b.scale = m.scale;
      b.window = layer.window;
      b.softcap = m.softcap;
      if (p.split) {
        attend<float, C>(b, 0, kv_head, piece, own.attention);
        int32_t* done = p.pieces_done + index * heads + task % heads;
        if (block.pieces > 1 && __atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) < block.pieces) return;
      } else {
        for (int64_t i = 0; i < block.pieces; ++i) attend<float, C>(b, 0, kv_head, i, own.attention);
      }
      if (block.pieces == 1) return;
      const int64_t group = m.heads / m.kv_heads;
      for (int64_t i = 0; i < block.queries * group; ++i) {
        join<float>(b, i / group * m.heads + kv_head * group + i % group, own.row);
      }
    });
  }

  template <class F>
  void for_pool(F&& f) {
    if (m.stored == Stored::int8) {
      f(i8{});
    } else if (m.stored == Stored::fp8) {
      f(fp8{});
    } else {
      m.pool == DType::f32 ? f(float{}) : f(bf16{});
    }
  }

  // Rows of x, normed, as a source of prepare_rows.
  auto normed(const float* weight) {
    return [this, weight](int64_t r, float* row) {
      rms_norm_row(p.x + r * p.at.x, weight, m.eps, m.dim, row);
      return static_cast<const float*>(row);
    };
  }

  void run_layer(int64_t index) {
    const LlamaLayer& layer = m.layers[index];
    const int64_t n = p.a.count;
    const auto heads = [&](int64_t offset, const float* bias, const PackedWeight& w) {
      return Epilogue{.kind = Epilogue::set, .to = p.qkv + offset, .ld = p.at.qkv, .bias = bias, .lanes = w.rows};
    };
    const Epilogue qkv[] = {heads(p.at.q, layer.q_bias, layer.q), heads(p.at.k, layer.k_bias, layer.k),
                            heads(p.at.v, layer.v_bias, layer.v)};
    products({&layer.q, &layer.k, &layer.v}, n, normed(layer.attn_norm), qkv);
    for_pool([&](auto c) { attend_layer<decltype(c)>(layer, index); });
    const Epilogue o = into_x(layer.o_bias, layer.attn_post_norm);
    products({&layer.o}, n, [&](int64_t r, float*) { return p.attended + r * p.at.attended; }, &o);
    join_branch(layer.attn_post_norm);
    mlp(layer, n);
    const Epilogue down = into_x(layer.down_bias, layer.mlp_post_norm);
    products({&layer.down}, n, [&](int64_t r, float*) { return p.hidden + r * p.at.hidden; }, &down);
    join_branch(layer.mlp_post_norm);
  }

  // hidden = act(gate) · up: for some panels the gate's product and then that with up, while its results are near.
  void mlp(const LlamaLayer& layer, int64_t n) {
    const auto hidden = [&](Epilogue::Kind kind, const float* bias) {
      return Epilogue{.kind = kind, .gelu = m.gelu, .to = p.hidden, .ld = p.at.hidden, .bias = bias, .lanes = m.hidden};
    };
    const Epilogue gate = hidden(Epilogue::gate, layer.gate_bias), up = hidden(Epilogue::up, layer.up_bias);
    if (!alike(layer.gate, layer.up)) {
      products({&layer.gate}, n, normed(layer.mlp_norm), &gate);
      return products({&layer.up}, n, normed(layer.mlp_norm), &up);
    }
    const PackedWeight* const one[] = {&layer.gate};
    panels(one, 1, n, normed(layer.mlp_norm), [&](const Prepared& x, int64_t, int64_t first, int64_t last) {
      const int64_t step = n < 16 ? last - first : 8;
      for (int64_t at = first; at < last; at += step) {
        product(layer.gate, x, n, at, smaller(at + step, last), gate);
        product(layer.up, x, n, at, smaller(at + step, last), up);
      }
    });
  }

  void finish() {
    if (p.states) {
      each(p.states, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const WantedRow& one = p.wanted[p.rows + i];
          rms_norm_row(p.x + one.token * p.at.x, m.norm, m.eps, m.dim, p.a.states + one.place * m.dim);
        }
      });
    }
    if (!p.rows) return;
    const auto source = [&](int64_t r, float* row) {
      rms_norm_row(p.x + p.wanted[r].token * p.at.x, m.norm, m.eps, m.dim, row);
      return static_cast<const float*>(row);
    };
    const Epilogue head{.kind = Epilogue::choose,
                        .lanes = m.head.rows,
                        .wanted = p.wanted,
                        .best = p.best + id * p.rows,
                        .logits = p.a.logits,
                        .cap = m.logit_softcap};
    products({&m.head}, p.rows, source, &head);
    each(p.rows, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        if (p.wanted[r].kind == Wanted::token) p.a.best[p.wanted[r].place] = most_likely(r);
      }
    });
  }

  // Of equal logits that of the smallest token.
  int64_t most_likely(int64_t row) const {
    float most = -__builtin_inff();
    int64_t token = 0;
    for (int64_t w = 0; w < p.a.workers; ++w) {
      const Best& b = p.best[w * p.rows + row];
      for (int64_t i = 0; i < kPanel; ++i) {
        const int64_t id = b.panel[i] * kPanel + i;
        if (b.value[i] > most || (b.value[i] == most && id < token)) most = b.value[i], token = id;
      }
    }
    return token;
  }

  void run() {
    embed();
    for (int64_t i = 0; i < static_cast<int64_t>(m.layers.size()); ++i) run_layer(i);
    finish();
  }
};

Status llama_step(const LlamaStep& a) {
  if (!a.count) return Status::ok;
  Pass p(a);
  lay_out(p);
  read_plan(p);
  p.team.run([&](int64_t worker) { Worker(p, worker).run(); });
  return Status::ok;
}

FINETUNE_REGISTER(LlamaStep, llama_step);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
