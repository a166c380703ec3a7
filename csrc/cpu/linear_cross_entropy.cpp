// Cross-entropy with z-loss (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, §5) of logits that are never all there:
//   lse = log Σ exp(l_j),   loss = lse − l_t + z · lse²,
//   d loss / d l_j = softmax(l)_j · (1 + 2 z lse) − [j = t].
//
// For each chunk of rows, with one reused buffer for the chunk's logits L:
//   1. L = x_chunk · Wᵀ, and each row's maximum and sum of exponentials, tile by tile (online softmax, Milakov &
//      Gimelshein 2018, arXiv:1805.02867),
//   2. L ← d(loss)/dL in place, dx_chunk = L · W, dW += Lᵀ · x_chunk.
// Each half is one parallel loop over tasks (block of rows × tile of the vocabulary, see LossPlan). A task makes its
// products on one thread, over data still in its cache. dx is summed over tiles and dW over blocks, in a fixed order:
// the result does not depend on the number of threads.
//
// The products run in `type`: fp32, or bf16 for bf16 inputs. bf16 inputs are otherwise converted, x_chunk whole and W
// a tile at a time. dW of bf16 is summed over the chunks in fp32 and rounded once.
//
// Memory: the first half reads a tile just multiplied, in blocks that stay in L1 between their maximum and their
// sum; the second overwrites it just before its products: 4 + 8 bytes a logit in fp32. About 20 FLOPs a logit each.
// Arithmetic is fp32; sums run over one block in lanes, and over blocks and tiles in double.
#include "finetune/linear_cross_entropy.h"

#include <new>

#include "simd.h"

// MKL, where torch has it: sets the calling thread's limit, 0 for none; returns the limit before.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

namespace finetune::FINETUNE_LEVEL {
namespace {

using Args = ChunkedCrossEntropy;

// A block of rows of logits for a tile of the vocabulary, dense.
struct LogitTile {
  DType dtype;
  void* data;              // (rows, size)
  const int64_t* targets;  // (rows,)
  int64_t rows, size;
  int64_t first;  // the tile's first token of the vocabulary
};

// What a chunk keeps of each row.
struct Rows {
  float* target;  // the target's logit
  float* max;     // of all logits
  float* factor;  // d(loss · scale)/d(logit) / exp(logit − max), of a logit that is not the target's
  float* loss;    // not scaled

  Rows from(int64_t row) const { return {target + row, max + row, factor + row, loss + row}; }
};

constexpr int64_t kBlock = 2048;

FINETUNE_INLINE float exp_of(float x) { return vexp(set1(x))[0]; }

template <class T>
void max_and_sum(const T* logits, int64_t size, float* max_out, double* sum_out) {
  float m = -__builtin_inff();
  double l = 0;  // Σ exp(logit − m)
  for (int64_t start = 0; start < size; start += kBlock) {
    const T* block = logits + start;
    const int64_t n = size - start < kBlock ? size - start : kBlock, whole = n / kLanes * kLanes;
    vf maxima = set1(m), sums{};
    for (int64_t j = 0; j < whole; j += kLanes) maxima = vmax(load(block + j), maxima);
    const float before = m;
    m = max(maxima);
    for (int64_t j = whole; j < n; ++j) m = to_float(block[j]) > m ? to_float(block[j]) : m;
    for (int64_t j = 0; j < whole; j += kLanes) sums += vexp(load(block + j) - m);
    if (whole < n) {
      const vf rest = vexp(load_part(block + whole, n - whole) - m);
      for (int64_t j = 0; j < n - whole; ++j) sums[j] += rest[j];
    }
    l = (before == m ? l : l * exp_of(before - m)) + sum(sums);
  }
  *max_out = m;
  *sum_out = l;
}

// Maximum and sum of each row of the tile; the targets' logits, where they lie in it.
template <class T>
void reduce_tile(const LogitTile& tile, float* row_max, double* row_sum, float* target) {
  for (int64_t row = 0; row < tile.rows; ++row) {
    const T* logits = static_cast<const T*>(tile.data) + row * tile.size;
    max_and_sum(logits, tile.size, row_max + row, row_sum + row);
    const int64_t at = tile.targets[row] - tile.first;
    if (at >= 0 && at < tile.size) target[row] = to_float(logits[at]);
  }
}

// Overwrites the tile's logits with d(loss · scale)/d(logit).
template <class T>
void grad_tile(const LogitTile& tile, const Rows& of, float scale) {
  for (int64_t row = 0; row < tile.rows; ++row) {
    T* logits = static_cast<T*>(tile.data) + row * tile.size;
    const float m = of.max[row], factor = of.factor[row];
    for_each_vector(tile.size,
                    [&](int64_t i, auto get, auto put) { put(logits + i, vexp(get(logits + i) - m) * factor); });
    const int64_t at = tile.targets[row] - tile.first;
    if (at >= 0 && at < tile.size) {  // from its logit, not from the number just stored (and perhaps rounded)
      store_part(logits + at, set1(exp_of(of.target[row] - m) * factor - scale), 1);
    }
  }
}

// Combines the tiles of `count` rows to their maxima, factors and losses; → the sum of the losses.
double combine_tiles(const Args& a, const Rows& of, int64_t count) {
  double losses = 0;
  for (int64_t row = 0; row < count; ++row) {
    const float* maxima = a.row_max + row;
    const double* sums = a.row_sum + row;
    float m = -__builtin_inff();
    for (int64_t t = 0; t < a.plan.tiles; ++t) m = maxima[t * a.plan.chunk] > m ? maxima[t * a.plan.chunk] : m;
    double l = 0;
    for (int64_t t = 0; t < a.plan.tiles; ++t) l += sums[t * a.plan.chunk] * exp_of(maxima[t * a.plan.chunk] - m);
    const float log_sum = static_cast<float>(__builtin_log(l)), lse = m + log_sum;
    of.loss[row] = (m - of.target[row]) + log_sum + a.z_loss * lse * lse;
    of.max[row] = m;
    of.factor[row] = static_cast<float>((1 + 2.0 * a.z_loss * lse) / l) * a.scale;
    losses += of.loss[row];
  }
  return losses;
}

// out = Σ of `count` parts of `size` elements, in their order.
template <class P, class T>
void sum_parts(const void* parts_, void* out_, int64_t count, int64_t size) {
  constexpr int64_t kPiece = 4096;
  const P* parts = static_cast<const P*>(parts_);
  T* out = static_cast<T*>(out_);
  parallel_for((size + kPiece - 1) / kPiece, 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece, last = end * kPiece < size ? end * kPiece : size;
    for_each_vector(last - first, [&](int64_t i, auto get, auto put) {
      vf total{};
      for (int64_t part = 0; part < count; ++part) total += get(parts + part * size + first + i);
      put(out + first + i, total);
    });
  });
}

void sum_parts(DType from, DType to, const void* parts, void* out, int64_t count, int64_t size) {
  if (from == DType::f32) {
    to == DType::f32 ? sum_parts<float, float>(parts, out, count, size)
                     : sum_parts<float, bf16>(parts, out, count, size);
  } else {
    to == DType::f32 ? sum_parts<bf16, float>(parts, out, count, size) : sum_parts<bf16, bf16>(parts, out, count, size);
  }
}

// sum += part, or sum = part
void add_part(const void* part_, float* sum, int64_t size, bool add) {
  const auto* part = static_cast<const bf16*>(part_);
  for_each_vector(size, [&](int64_t i, auto get, auto put) {
    const vf value = get(part + i);
    put(sum + i, add ? get(sum + i) + value : value);
  });
}

void widen(const void* from_, void* to_, int64_t size) {
  const auto* from = static_cast<const bf16*>(from_);
  auto* to = static_cast<float*>(to_);
  for_each_vector(size, [&](int64_t i, auto get, auto put) { put(to + i, get(from + i)); });
}

// While it lives, this thread's products are made by one thread and divided as for one thread: even in a parallel
// region MKL otherwise divides long sums by the number of threads that it might have had.
struct OneThread {
  int before = MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0;
  OneThread() = default;
  OneThread(const OneThread&) = delete;
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before);
  }
};

// Uninitialized memory on a cache line of its own.
struct Buffer {
  explicit Buffer(int64_t bytes) : data(::operator new(static_cast<size_t>(bytes), kAlignment)) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data, kAlignment); }

  static constexpr std::align_val_t kAlignment{64};
  void* data;
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

const void* row_of(const void* matrix, int64_t row, int64_t n_cols, DType dtype) {
  return static_cast<const char*>(matrix) + row * n_cols * bytes_of(dtype);
}
void* row_of(void* matrix, int64_t row, int64_t n_cols, DType dtype) {
  return static_cast<char*>(matrix) + row * n_cols * bytes_of(dtype);
}

struct Loop {
  const Args& a;

  double run() const {
    double loss = 0;
    for (int64_t start = 0; start < a.n_rows; start += a.plan.chunk) {
      loss += chunk(start, smaller(a.plan.chunk, a.n_rows - start));
    }
    if (a.dweight && !a.sums_in_place()) {
      sum_parts(DType::f32, a.dtype, a.dweight_parts, a.dweight, a.plan.blocks, a.vocab * a.n_cols);
    }
    return loss;
  }

 private:
  // A task's part of a chunk, and this thread's memory for it.
  struct Task {
    LogitTile logits;
    const void* x;       // (rows, n_cols) of `type`
    const void* weight;  // (size, n_cols) of `type`
    int64_t row, block, tile;
    void* product;  // (size, n_cols) of `type`, where that is bf16
  };

  double chunk(int64_t start, int64_t count) const {
    const Rows rows{a.per_row, a.per_row + a.plan.chunk, a.per_row + 2 * a.plan.chunk, a.per_row + 3 * a.plan.chunk};
    const void* x = row_of(a.x, start, a.n_cols, a.dtype);
    if (a.widens()) {
      parallel_for(count, 16, [&](int64_t begin, int64_t end) {
        widen(row_of(x, begin, a.n_cols, a.dtype), row_of(a.x_wide, begin, a.n_cols, a.type), (end - begin) * a.n_cols);
      });
      x = a.x_wide;
    }

    each_task(x, a.targets + start, count, [&](const Task& task) {
      const LogitTile& tile = task.logits;
      a.multiply({a.type, task.x, task.weight, tile.data, tile.rows, tile.size, a.n_cols, false, true, false});
      const int64_t at = task.tile * a.plan.chunk + task.row;
      auto* reduce = a.type == DType::f32 ? reduce_tile<float> : reduce_tile<bf16>;
      reduce(tile, a.row_max + at, a.row_sum + at, rows.target + task.row);
    });
    const double loss = combine_tiles(a, rows, count);
    if (!a.dx && !a.dweight) return loss;

    each_task(x, a.targets + start, count, [&](const Task& task) {
      const LogitTile& tile = task.logits;
      auto* grad = a.type == DType::f32 ? grad_tile<float> : grad_tile<bf16>;
      grad(tile, rows.from(task.row), a.scale);
      if (a.dx) {
        void* part = row_of(a.dx_parts, task.tile * count + task.row, a.n_cols, a.type);
        a.multiply({a.type, tile.data, task.weight, part, tile.rows, a.n_cols, tile.size, false, false, false});
      }
      if (a.dweight) add_to_dweight(task, start > 0);
    });
    if (a.dx) {
      void* dx = row_of(a.dx, start, a.n_cols, a.dtype);
      sum_parts(a.type, a.dtype, a.dx_parts, dx, a.plan.tiles, count * a.n_cols);
    }
    return loss;
  }

  // dW of the tile (+)= Lᵀ · x, in fp32
  void add_to_dweight(const Task& task, bool add) const {
    const LogitTile& tile = task.logits;
    float* sum = a.sums_in_place() ? static_cast<float*>(a.dweight) + tile.first * a.n_cols
                                   : a.dweight_parts + (task.block * a.vocab + tile.first) * a.n_cols;
    const bool narrow = a.type == DType::bf16;  // products of bf16 are rounded to bf16
    void* to = narrow ? task.product : sum;
    a.multiply({a.type, tile.data, task.x, to, tile.size, a.n_cols, tile.rows, true, false, add && !narrow});
    if (narrow) add_part(to, sum, tile.size * a.n_cols, add);
  }

  // body(task) for the tasks of a chunk of `count` rows, spread over the threads.
  template <class Body>
  void each_task(const void* x, const int64_t* targets, int64_t count, Body&& body) const {
    const LossPlan& plan = a.plan;
    const int64_t tasks = (count + plan.block - 1) / plan.block * plan.tiles;
    // Never a single task: torch would run it outside of a parallel region, and its product on all threads.
    parallel_for(tasks > 1 ? tasks : 2, 1, [&](int64_t begin, int64_t end) {
      const OneThread one;
      const int64_t bytes = plan.tile * a.n_cols * bytes_of(a.type);
      const Buffer wide(a.widens() ? bytes : 0), product(a.dweight && a.type == DType::bf16 ? bytes : 0);
      for (int64_t i = begin; i < smaller(end, tasks); ++i) {
        const int64_t block = i / plan.tiles, at = i % plan.tiles, row = block * plan.block, first = at * plan.tile;
        const int64_t rows = smaller(plan.block, count - row), size = smaller(plan.tile, a.vocab - first);
        const void* weight = row_of(a.weight, first, a.n_cols, a.dtype);
        if (a.widens()) {
          widen(weight, wide.data, size * a.n_cols);
          weight = wide.data;
        }
        void* data = row_of(a.logits, row * a.vocab + rows * first, 1, a.type);  // the task's logits, one dense matrix
        const LogitTile logits{a.type, data, targets + row, rows, size, first};
        body(Task{logits, row_of(x, row, a.n_cols, a.type), weight, row, block, at, product.data});
      }
    });
  }
};

Status chunked_cross_entropy(const Args& a) {
  *a.loss = Loop{a}.run();
  return Status::ok;
}

FINETUNE_REGISTER(ChunkedCrossEntropy, chunked_cross_entropy);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
