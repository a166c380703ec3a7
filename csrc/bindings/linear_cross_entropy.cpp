// The chunk loop of linear_cross_entropy. Per chunk of tokens, with one reused buffer for the chunk's logits L:
//   1. L = x_chunk · Wᵀ and each row's maximum and sum of exponentials,
//   2. L ← d(loss)/dL in place, dx_chunk = L · W, dW += Lᵀ · x_chunk.
// Each half is one parallel loop over tasks (block of rows × tile of the vocabulary), at most kTasks of them: blocks
// where the vocabulary is small, tiles where it is large. A task's matrix products are torch's, on one thread, over
// data still in its cache. dx is summed over tiles and dW over blocks, in a fixed order: the result does not depend
// on the number of threads.
//
// The products run in `type`: fp32, or bf16 (for bf16 inputs, where `bf16_matmul` says so or, left open, the machine
// has AMX). bf16 inputs are otherwise widened, x_chunk whole and W a tile at a time. dW of bf16 is summed over the
// chunks in fp32 and rounded once.
#include "finetune/linear_cross_entropy.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "common.h"

// MKL, if this torch has it: the calling thread's limit, 0 for none; returns the limit before.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

namespace finetune {
namespace {

// While it lives, this thread's products are made by one thread and cut as one thread would cut them: even in a
// parallel region MKL otherwise cuts long sums by the number of threads that it might have had.
struct OneThread {
  int before = MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0;
  OneThread() = default;
  OneThread(const OneThread&) = delete;
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before);
  }
};

constexpr int64_t kLogitBytes = 24 << 20;  // of the logits buffer: 128 rows of SmolLM2's 49152 in fp32
constexpr int64_t kLeastRows = 64;         // of a chunk: fewer would leave the products memory bound
constexpr int64_t kTasks = 32, kLeastTile = 256, kLeastBlock = 16;

ScalarType scalar_of(DType dtype) { return dtype == DType::f32 ? ScalarType::Float : ScalarType::BFloat16; }

// A row-major matrix in memory that somebody else owns.
struct Matrix {
  void* data;
  int64_t rows, cols;
  DType dtype;

  Matrix from_row(int64_t row, int64_t count) const {
    return {static_cast<char*>(data) + row * cols * bytes_of(dtype), count, cols, dtype};
  }
  Tensor view(bool transposed = false) const {  // not a torch view: autograd must not see it, on any thread
    const std::vector<int64_t> size{rows, cols}, stride{cols, 1}, size_t{cols, rows}, stride_t{1, cols};
    return torch::stable::from_blob(data, transposed ? size_t : size, transposed ? stride_t : stride,
                                    {torch::headeronly::DeviceType::CPU, 0}, scalar_of(dtype));
  }
};

Matrix matrix(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), t.size(0), t.size(1), dtype_of(t)}; }

// out = a · b, or out += a · b
void product(const Matrix& out, const Tensor& a, const Tensor& b, bool add = false) {
  const Tensor to = out.view();
  STABLE_TORCH_ERROR_CODE_CHECK(add ? aoti_torch_cpu_addmm_out(to.get(), to.get(), a.get(), b.get(), 1.0, 1.0)
                                    : aoti_torch_cpu_mm_out(to.get(), a.get(), b.get()));
}

Tensor call(const char* name, std::vector<StableIValue> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Positions and values of the targets that count; an error names the first that is out of the vocabulary.
std::tuple<Tensor, Tensor> kept(const Tensor& targets, int64_t ignore_index, int64_t vocab) {
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const int64_t size = targets.numel(), count = size - std::count(target, target + size, ignore_index);
  Tensor positions = torch::stable::new_empty(targets, {count}), values = torch::stable::new_empty(targets, {count});
  int64_t *position = positions.mutable_data_ptr<int64_t>(), *value = values.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < size; ++i) {
    if (target[i] == ignore_index) continue;
    STD_TORCH_CHECK(target[i] >= 0 && target[i] < vocab, "linear_cross_entropy: targets[", i, "] is ", target[i],
                    ", outside the vocabulary of ", vocab, " (positions to skip hold ignore_index = ", ignore_index,
                    ")");
    *position++ = i;
    *value++ = target[i];
  }
  return {positions, values};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The cut of all work, a function of the sizes alone.
struct Plan {
  int64_t chunk, tile, tiles, block, blocks;

  Plan(int64_t rows, int64_t vocab, DType type) {
    const int64_t most = std::max(kLeastRows, kLogitBytes / (vocab * bytes_of(type)));
    chunk = ceil_div(rows, ceil_div(rows, most));
    tile = std::max(kLeastTile, ceil_div(vocab, kTasks));
    tiles = ceil_div(vocab, tile);
    block = std::max(kLeastBlock, ceil_div(chunk, std::max<int64_t>(kTasks / tiles, 1)));
    blocks = ceil_div(chunk, block);
  }
};

struct Loop {
  const Matrix x, weight;  // (rows, C) and (V, C)
  const int64_t* targets;  // (rows,)
  Matrix dx, dweight;      // (rows, C) and (V, C); no rows where not wanted
  float z_loss, scale;
  DType type;
  bool x_grad, weight_grad;
  const Plan plan{x.rows, weight.rows, type};

  Tensor new_empty(std::vector<int64_t> size, ScalarType scalar) const {
    return torch::stable::empty(size, scalar, std::nullopt,
                                torch::stable::Device(torch::headeronly::DeviceType::CPU, 0));
  }

  double run_all() {  // → the loss, summed and not scaled
    const int64_t dim = x.cols, vocab = weight.rows;
    const bool widen = x.dtype != type, grad = x_grad || weight_grad;
    const bool direct = plan.blocks == 1 && dweight.dtype == DType::f32;  // dW needs no sum beside it
    const ScalarType scalar = scalar_of(type), f32 = ScalarType::Float;
    const Tensor logits = new_empty({plan.chunk, vocab}, scalar),
                 x_wide = new_empty({widen ? plan.chunk : 0, dim}, scalar),
                 tops = new_empty({plan.tiles, plan.chunk}, f32),
                 sums = new_empty({plan.tiles, plan.chunk}, ScalarType::Double), rows = new_empty({4, plan.chunk}, f32),
                 dx_parts = new_empty({x_grad ? plan.tiles * plan.chunk : 0, dim}, scalar),
                 dweight_parts = new_empty({weight_grad && !direct ? plan.blocks * vocab : 0, dim}, f32);
    float *top = rows.mutable_data_ptr<float>(), *hit = top + plan.chunk, *factor = hit + plan.chunk,
          *loss = factor + plan.chunk;
    double total = 0;
    for (int64_t start = 0; start < x.rows; start += plan.chunk) {
      const int64_t count = std::min(plan.chunk, x.rows - start);
      Matrix x_chunk = x.from_row(start, count);
      if (widen) {
        Matrix wide = matrix(x_wide).from_row(0, count);
        Tensor to = wide.view();
        torch::stable::copy_(to, x_chunk.view());
        x_chunk = wide;
      }
      const auto part = [&](int64_t block_at, int64_t tile_at) {  // the task's logits, one dense matrix
        const int64_t row = block_at * plan.block, first = tile_at * plan.tile;
        const int64_t n = std::min(plan.block, count - row), size = std::min(plan.tile, vocab - first);
        char* data = static_cast<char*>(logits.mutable_data_ptr()) + (row * vocab + n * first) * bytes_of(type);
        return LogitTile{type, data, targets + start + row, n, size, first};
      };

      each_task(count, [&](int64_t block_at, int64_t tile_at, const Scratch& scratch) {
        const LogitTile tile = part(block_at, tile_at);
        const int64_t row = block_at * plan.block, at = tile_at * plan.chunk + row;
        product({tile.data, tile.rows, tile.size, type}, x_chunk.from_row(row, tile.rows).view(),
                weight_tile(tile, scratch).view(true));
        run("linear_cross_entropy", CrossEntropyTile{tile, tops.mutable_data_ptr<float>() + at,
                                                     sums.mutable_data_ptr<double>() + at, hit + row});
      });
      run("linear_cross_entropy", CrossEntropyLoss{tops.const_data_ptr<float>(), sums.const_data_ptr<double>(), hit,
                                                   loss, top, factor, count, plan.chunk, plan.tiles, z_loss, scale});
      for (int64_t i = 0; i < count; ++i) total += loss[i];
      if (!grad) continue;

      each_task(count, [&](int64_t block_at, int64_t tile_at, const Scratch& scratch) {
        const LogitTile tile = part(block_at, tile_at);
        const int64_t row = block_at * plan.block;
        run("linear_cross_entropy", CrossEntropyGrad{tile, hit + row, top + row, factor + row, scale});
        const Matrix dlogits{tile.data, tile.rows, tile.size, type}, x_block = x_chunk.from_row(row, tile.rows);
        if (x_grad) {
          product(matrix(dx_parts).from_row(tile_at * count + row, tile.rows), dlogits.view(),
                  weight_tile(tile, scratch).view());
        }
        if (!weight_grad) return;
        const Matrix sum = direct ? dweight.from_row(tile.first, tile.size)
                                  : matrix(dweight_parts).from_row(block_at * vocab + tile.first, tile.size);
        if (type == DType::f32) return product(sum, dlogits.view(true), x_block.view(), start > 0);
        const Matrix rounded{scratch.product, tile.size, dim, type};  // torch rounds products of bf16 to bf16
        product(rounded, dlogits.view(true), x_block.view());
        run("linear_cross_entropy", AddPart{rounded.data, static_cast<float*>(sum.data), tile.size * dim, start > 0});
      });
      if (x_grad) {
        run("linear_cross_entropy", SumParts{dx_parts.const_data_ptr(), dx.from_row(start, count).data, type, dx.dtype,
                                             plan.tiles, count * dim});
      }
    }
    if (weight_grad && !direct) {
      run("linear_cross_entropy",
          SumParts{dweight_parts.const_data_ptr(), dweight.data, DType::f32, dweight.dtype, plan.blocks, vocab * dim});
    }
    return total;
  }

 private:
  struct Scratch {
    void *weight, *product;
  };

  // body(block, tile, scratch) for the tasks of a chunk of `count` rows, spread over the threads.
  template <class Body>
  void each_task(int64_t count, Body&& body) const {
    const int64_t blocks = ceil_div(count, plan.block), tasks = blocks * plan.tiles;
    // Never a single task: torch would run it outside of a parallel region, and its product on all threads.
    parallel_for(std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
      const OneThread one;
      const bool widen = weight.dtype != type, round = weight_grad && type == DType::bf16;
      const Tensor wide = new_empty({widen ? plan.tile : 0, x.cols}, scalar_of(type));
      const Tensor rounded = new_empty({round ? plan.tile : 0, x.cols}, scalar_of(type));
      const Scratch scratch{wide.mutable_data_ptr(), rounded.mutable_data_ptr()};
      for (int64_t task = begin; task < std::min(end, tasks); ++task)
        body(task / plan.tiles, task % plan.tiles, scratch);
    });
  }

  Matrix weight_tile(const LogitTile& tile, const Scratch& scratch) const {
    const Matrix part = weight.from_row(tile.first, tile.size);
    if (weight.dtype == type) return part;
    const Matrix wide{scratch.weight, tile.size, weight.cols, type};
    Tensor to = wide.view();
    torch::stable::copy_(to, part.view());
    return wide;
  }
};

#if FINETUNE_DEVICE
// The CUDA kernels do all of it; the host waits for nothing, so a target outside of the vocabulary makes the loss NaN.
std::tuple<Tensor, Tensor, Tensor> by_kernels(const Tensor& x, const Tensor& weight, const Tensor& targets,
                                              int64_t ignore_index, double z_loss, bool mean, bool x_grad,
                                              bool weight_grad) {
  LinearCrossEntropy a{};
  a.dtype = dtype_of(x);
  a.rows = x.size(0), a.dim = x.size(1), a.vocab = weight.size(0);
  a.ignore_index = ignore_index, a.z_loss = static_cast<float>(z_loss), a.mean = mean;
  const Tensor loss = empty_f32(x, {}), dx = torch::stable::new_empty(x, {x_grad ? a.rows : 0, a.dim});
  Tensor dweight = torch::stable::new_empty(weight, {weight_grad ? a.vocab : 0, a.dim});
  if (!a.rows) {
    torch::stable::zero_(dweight);
    return {torch::stable::new_zeros(x, {}, ScalarType::Float), dx, dweight};
  }
  check(a.vocab > 0, "linear_cross_entropy", "the vocabulary is empty");
  const bool grad = x_grad || weight_grad;
  const Tensor kept = torch::stable::new_empty(targets, {a.rows}), place = torch::stable::new_empty(targets, {a.rows}),
               count = torch::stable::new_empty(targets, {1}), part_m = empty_f32(x, {a.parts(), a.rows}),
               part_l = empty_f32(x, {a.parts(), a.rows}), per_row = empty_f32(x, {4, a.rows}),
               dlogits = torch::stable::new_empty(x, {grad ? a.chunk_here() : 0, a.tile_here()}),
               dx_sum = empty_f32(x, {x_grad ? a.dx_splits() * a.rows : 0, a.dim}),
               dweight_sum = empty_f32(x, {weight_grad && a.rows > a.chunk ? a.tile_here() : 0, a.dim});
  a.x = in(x), a.weight = in(weight), a.targets = in<int64_t>(targets), a.loss = out<float>(loss);
  a.dx = x_grad ? out(dx) : nullptr, a.dweight = weight_grad ? out(dweight) : nullptr;
  a.kept = out<int64_t>(kept), a.place = out<int64_t>(place), a.count = out<int64_t>(count);
  a.part_m = out<float>(part_m), a.part_l = out<float>(part_l), a.per_row = out<float>(per_row),
  a.dlogits = out(dlogits);
  a.dx_sum = out<float>(dx_sum), a.dweight_sum = out<float>(dweight_sum);
  run_device("linear_cross_entropy", x, a);
  return {loss, dx, dweight};
}
#endif

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& x_, const Tensor& weight_, const Tensor& targets_,
                                                        int64_t ignore_index, double z_loss, bool mean, bool x_grad,
                                                        bool weight_grad, std::optional<bool> bf16_matmul) {
  constexpr const char* op = "linear_cross_entropy";
  check(x_.dim() == 2 && weight_.dim() == 2 && x_.size(1) == weight_.size(1), op,
        "x (N, C) and weight (V, C) expected");
  check(targets_.dim() == 1 && targets_.size(0) == x_.size(0), op, "targets must be (N,) for x (N, C)");
  check(targets_.scalar_type() == ScalarType::Long, op, "targets must be int64");
  check(x_.scalar_type() == weight_.scalar_type(), op, "x and weight must have one dtype");
  const Tensor weight = torch::stable::contiguous(weight_);
#if FINETUNE_DEVICE
  if (on_device(x_)) {
    return by_kernels(torch::stable::contiguous(x_), weight, torch::stable::contiguous(targets_), ignore_index, z_loss,
                      mean, x_grad, weight_grad);
  }
#endif
  const int64_t vocab = weight.size(0), dim = weight.size(1);
  const auto [positions, targets] = kept(torch::stable::contiguous(targets_), ignore_index, vocab);
  const int64_t rows = targets.numel();
  const bool all = rows == x_.size(0);
  using torch::stable::detail::from;
  const Tensor x =
      all ? torch::stable::contiguous(x_) : call("aten::index_select", {from(x_), from(int64_t{0}), from(positions)});

  Tensor loss = torch::stable::new_zeros(x, {}, ScalarType::Float);
  Tensor dx = torch::stable::new_empty(x, {x_grad ? rows : 0, dim});
  Tensor dweight = torch::stable::new_empty(weight, {weight_grad ? vocab : 0, dim});
  if (rows) {
    const double scale = mean ? 1.0 / static_cast<double>(rows) : 1.0;
    // torch multiplies bf16 matrices fast where there is AMX, and several times slower than fp32 ones elsewhere.
    const bool narrow = dtype_of(x) == DType::bf16 && bf16_matmul.value_or(level() == Level::amx);
    const DType type = narrow ? DType::bf16 : DType::f32;
    Loop loop{matrix(x),
              matrix(weight),
              targets.const_data_ptr<int64_t>(),
              matrix(dx),
              matrix(dweight),
              static_cast<float>(z_loss),
              static_cast<float>(scale),
              type,
              x_grad,
              weight_grad};
    *loss.mutable_data_ptr<float>() = static_cast<float>(loop.run_all() * scale);
  } else {
    torch::stable::zero_(dweight);
  }
  if (x_grad && !all) {
    const Tensor every = torch::stable::new_zeros(x, {x_.size(0), dim});
    dx = call("aten::index_copy_", {from(every), from(int64_t{0}), from(positions), from(dx)});
  }
  return {loss, dx, dweight};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index, float z_loss, bool mean, bool "
      "x_grad, bool weight_grad, bool? bf16_matmul) -> (Tensor loss, Tensor dx, Tensor dweight)");
}
FINETUNE_KERNELS(m) { FINETUNE_KERNEL(m, "linear_cross_entropy", linear_cross_entropy); }

}  // namespace finetune
