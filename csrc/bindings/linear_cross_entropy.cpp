// The chunk loop of linear_cross_entropy. Matrix products are torch's; the loss is the kernel's. Per chunk of tokens:
//   L = x_chunk · Wᵀ   (one buffer, reused),   L ← d(loss)/dL in place,   dx_chunk = L · W,   dW += Lᵀ · x_chunk.
// Products run in the type `bf16_matmul` says. Without it, bf16 inputs are widened: x_chunk whole, W a tile of the
// vocabulary at a time (fp32 inputs have one tile, which is W itself). dW is summed over the chunks in fp32.
#include "finetune/linear_cross_entropy.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cmath>

#include "common.h"

namespace finetune {
namespace {

constexpr int64_t kLogitBytes = 24 << 20;  // of the logits buffer: 128 rows of SmolLM2's 49152 in fp32
constexpr int64_t kLeastRows = 64;         // fewer would leave the products memory bound
constexpr int64_t kTileBytes = 8 << 20;    // of a widened tile of W

void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out (+)= a · b
void mm_into(bool add, const Tensor& out, const Tensor& a, const Tensor& b) {
  if (!add) return mm_out(out, a, b);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

Tensor rows_of(const Tensor& t, int64_t start, int64_t count) {
  Tensor base = t;
  return torch::stable::narrow(base, 0, start, count);
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

Tensor call_index(const char* name, const std::vector<StableIValue>& arguments) {
  std::vector<StableIValue> stack = arguments;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor index_select(const Tensor& t, const Tensor& index) {
  using torch::stable::detail::from;
  return call_index("aten::index_select", {from(t), from(int64_t{0}), from(index)});
}

void index_copy_(const Tensor& t, const Tensor& index, const Tensor& source) {
  using torch::stable::detail::from;
  call_index("aten::index_copy_", {from(t), from(int64_t{0}), from(index), from(source)});
}

// Positions and values of the targets that count; an error names the first that is out of the vocabulary.
std::tuple<Tensor, Tensor> kept(const Tensor& targets, int64_t ignore_index, int64_t vocab) {
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const int64_t size = targets.numel();
  const int64_t count = size - std::count(target, target + size, ignore_index);
  Tensor positions = torch::stable::new_empty(targets, {count}), values = torch::stable::new_empty(targets, {count});
  int64_t *position = positions.mutable_data_ptr<int64_t>(), *value = values.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < size; ++i) {
    if (target[i] == ignore_index) continue;
    STD_TORCH_CHECK(target[i] >= 0 && target[i] < vocab, "linear_cross_entropy: targets[", i, "] is ", target[i],
                    ", outside the vocabulary of ", vocab, " (positions to skip hold ignore_index = ", ignore_index, ")");
    *position++ = i;
    *value++ = target[i];
  }
  return {positions, values};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& x_, const Tensor& weight_, const Tensor& targets_,
                                                        int64_t ignore_index, double z_loss, bool mean, bool x_grad,
                                                        bool weight_grad, bool bf16_matmul) {
  using torch::stable::copy_;
  constexpr const char* op = "linear_cross_entropy";
  check(x_.dim() == 2 && weight_.dim() == 2 && x_.size(1) == weight_.size(1), op, "x (N, C) and weight (V, C) expected");
  check(targets_.dim() == 1 && targets_.size(0) == x_.size(0), op, "targets must be (N,) for x (N, C)");
  check(targets_.scalar_type() == ScalarType::Long, op, "targets must be int64");
  check(x_.scalar_type() == weight_.scalar_type(), op, "x and weight must have one dtype");
  const Tensor weight = torch::stable::contiguous(weight_);
  const int64_t vocab = weight.size(0), dim = weight.size(1);
  const auto [positions, targets] = kept(torch::stable::contiguous(targets_), ignore_index, vocab);
  const int64_t rows = targets.numel();
  const bool all = rows == x_.size(0);
  const Tensor x = all ? torch::stable::contiguous(x_) : index_select(x_, positions);

  const DType given = dtype_of(x), type = given == DType::bf16 && bf16_matmul ? DType::bf16 : DType::f32;
  const ScalarType scalar = type == DType::bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  const bool widen = given != type;
  const double scale = mean ? 1.0 / static_cast<double>(std::max<int64_t>(rows, 1)) : 1.0;

  Tensor loss = torch::stable::new_empty(x, {}, ScalarType::Float);
  Tensor dx = torch::stable::new_empty(x, {x_grad ? rows : 0, dim});
  Tensor dweight = torch::stable::new_empty(weight, {weight_grad ? vocab : 0, dim});
  Tensor dweight32 = weight_grad && given == DType::bf16 ? empty_f32(weight, {vocab, dim}) : dweight;
  if (weight_grad && !rows) torch::stable::zero_(dweight);

  const int64_t fit = std::max(kLeastRows, kLogitBytes / std::max<int64_t>(vocab * bytes_of(type), 1));
  const int64_t chunks = (rows + fit - 1) / fit, chunk = chunks ? (rows + chunks - 1) / chunks : 0;
  const int64_t tile = widen ? std::min(vocab, std::max<int64_t>(kTileBytes / 4 / std::max<int64_t>(dim, 1), 64)) : vocab;
  Tensor logits = torch::stable::new_empty(x, {chunk, vocab}, scalar);
  Tensor losses = empty_f32(x, {chunk});
  Tensor x_wide = torch::stable::new_empty(x, {widen ? chunk : 0, dim}, scalar);
  Tensor dx_wide = torch::stable::new_empty(x, {widen && x_grad ? chunk : 0, dim}, scalar);
  Tensor tile_wide = torch::stable::new_empty(x, {widen ? tile : 0, dim}, scalar);
  const auto weight_tile = [&](int64_t start, int64_t size) {
    const Tensor part = rows_of(weight, start, size);
    if (!widen) return part;
    Tensor wide = rows_of(tile_wide, 0, size);
    return copy_(wide, part);
  };

  double total = 0;
  for (int64_t start = 0; start < rows; start += chunk) {
    const int64_t count = std::min(chunk, rows - start);
    Tensor x_chunk = rows_of(x, start, count);
    if (widen) {
      Tensor wide = rows_of(x_wide, 0, count);
      x_chunk = copy_(wide, x_chunk);
    }
    Tensor out = rows_of(logits, 0, count);  // (count, V)
    for (int64_t at = 0; at < vocab; at += tile) {
      const int64_t size = std::min(tile, vocab - at);
      mm_out(torch::stable::narrow(out, 1, at, size), x_chunk, transposed(weight_tile(at, size)));
    }
    run(op, CrossEntropyRows{type, logits.mutable_data_ptr(), targets.const_data_ptr<int64_t>() + start,
                             losses.mutable_data_ptr<float>(), count, vocab, static_cast<float>(z_loss),
                             static_cast<float>(scale), x_grad || weight_grad});
    const float* each = losses.const_data_ptr<float>();
    for (int64_t i = 0; i < count; ++i) total += each[i];
    if (!x_grad && !weight_grad) continue;

    Tensor dx_chunk = widen ? rows_of(dx_wide, 0, x_grad ? count : 0) : rows_of(dx, x_grad ? start : 0, x_grad ? count : 0);
    for (int64_t at = 0; at < vocab; at += tile) {
      const int64_t size = std::min(tile, vocab - at);
      const Tensor dlogits = torch::stable::narrow(out, 1, at, size);  // (count, size)
      if (x_grad) mm_into(at > 0, dx_chunk, dlogits, weight_tile(at, size));
      if (!weight_grad) continue;
      const Tensor sum = rows_of(dweight32, at, size);
      if (type == DType::f32) {
        mm_into(start > 0, sum, transposed(dlogits), x_chunk);
      } else {  // torch rounds the product of bf16 matrices to bf16: each chunk's is added up in fp32
        mm_out(dweight, transposed(dlogits), x_chunk);
        run(op, AddRounded{dweight.const_data_ptr(), sum.mutable_data_ptr<float>(), vocab * dim, start > 0});
      }
    }
    if (widen && x_grad) {
      Tensor place = rows_of(dx, start, count);
      copy_(place, dx_chunk);
    }
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(total * scale);
  if (weight_grad && rows && given == DType::bf16) copy_(dweight, dweight32);
  if (x_grad && !all) {
    Tensor every = torch::stable::new_zeros(x, {x_.size(0), dim});
    index_copy_(every, positions, dx);
    dx = every;
  }
  return {loss, dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(finetune, m) {
  m.def(
      "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index, float z_loss, bool mean, bool "
      "x_grad, bool weight_grad, bool bf16_matmul) -> (Tensor loss, Tensor dx, Tensor dweight)");
}
STABLE_TORCH_LIBRARY_IMPL(finetune, CPU, m) { m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy)); }

}  // namespace finetune
