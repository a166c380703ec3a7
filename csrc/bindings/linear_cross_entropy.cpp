// Checks, allocation, and the matrix products of csrc/cpu/linear_cross_entropy.cpp, which are torch's.
#include "finetune/linear_cross_entropy.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common.h"

namespace finetune {
namespace {

ScalarType scalar_of(DType dtype) { return dtype == DType::f32 ? ScalarType::Float : ScalarType::BFloat16; }

// Not a torch view: autograd must not see it, on any thread.
Tensor matrix(const void* data, int64_t rows, int64_t cols, bool transposed, DType dtype) {
  const std::vector<int64_t> size{rows, cols},
      stride = transposed ? std::vector<int64_t>{1, rows} : std::vector<int64_t>{cols, 1};
  return torch::stable::from_blob(const_cast<void*>(data), size, stride, {torch::headeronly::DeviceType::CPU, 0},
                                  scalar_of(dtype));
}

void multiply(const MatrixProduct& p) {
  const Tensor a = matrix(p.a, p.m, p.k, p.a_transposed, p.dtype), b = matrix(p.b, p.k, p.n, p.b_transposed, p.dtype),
               c = matrix(p.c, p.m, p.n, false, p.dtype);
  STABLE_TORCH_ERROR_CODE_CHECK(p.add ? aoti_torch_cpu_addmm_out(c.get(), c.get(), a.get(), b.get(), 1.0, 1.0)
                                      : aoti_torch_cpu_mm_out(c.get(), a.get(), b.get()));
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

// The CPU kernel on rows that all count, in products of `type`; → the loss, summed and not scaled.
double by_chunks(const Tensor& x, const Tensor& weight, const Tensor& targets, const Tensor& dx, const Tensor& dweight,
                 double z_loss, double scale, DType type, bool x_grad, bool weight_grad) {
  double loss = 0;
  ChunkedCrossEntropy a{};
  a.dtype = dtype_of(x), a.type = type;
  a.n_rows = x.size(0), a.n_cols = x.size(1), a.vocab = weight.size(0);
  a.z_loss = static_cast<float>(z_loss), a.scale = static_cast<float>(scale);
  a.plan = LossPlan::of(a.n_rows, a.vocab, type);
  const auto [chunk, tile, tiles, block, blocks] = a.plan;

  const auto scratch = [&](std::vector<int64_t> size, ScalarType scalar) {
    return torch::stable::empty(size, scalar, std::nullopt, x.device());
  };
  const ScalarType scalar = scalar_of(type), f32 = ScalarType::Float;
  const Tensor logits = scratch({chunk, a.vocab}, scalar), x_wide = scratch({a.widens() ? chunk : 0, a.n_cols}, scalar),
               row_max = scratch({tiles, chunk}, f32), row_sum = scratch({tiles, chunk}, ScalarType::Double),
               per_row = scratch({4, chunk}, f32), dx_parts = scratch({x_grad ? tiles * chunk : 0, a.n_cols}, scalar),
               dweight_parts = scratch({weight_grad && !a.sums_in_place() ? blocks * a.vocab : 0, a.n_cols}, f32);

  a.x = x.const_data_ptr(), a.weight = weight.const_data_ptr(), a.targets = targets.const_data_ptr<int64_t>();
  a.loss = &loss;
  a.dx = x_grad ? dx.mutable_data_ptr() : nullptr, a.dweight = weight_grad ? dweight.mutable_data_ptr() : nullptr;
  a.logits = logits.mutable_data_ptr(), a.x_wide = x_wide.mutable_data_ptr();
  a.row_max = row_max.mutable_data_ptr<float>(), a.row_sum = row_sum.mutable_data_ptr<double>();
  a.per_row = per_row.mutable_data_ptr<float>(), a.dx_parts = dx_parts.mutable_data_ptr();
  a.dweight_parts = dweight_parts.mutable_data_ptr<float>();
  a.multiply = multiply;
  run("linear_cross_entropy", a);
  return loss;
}

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
    const double sum = by_chunks(x, weight, targets, dx, dweight, z_loss, scale, type, x_grad, weight_grad);
    *loss.mutable_data_ptr<float>() = static_cast<float>(sum * scale);
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
