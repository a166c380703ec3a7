#include "finetune/token_logprobs.h"

#include "common.h"

namespace finetune {
namespace {

// On the CPU the targets are looked at: outside of the vocabulary there is other memory. A device would have to be
// waited for: its kernels mark such rows with NaN.
void check_inputs(const Tensor& logits, const Tensor& targets, double temperature, int64_t ignore_index) {
  check(logits.dim() == 2, "token_logprobs", "logits must be (N, V)");
  check(targets.dim() == 1 && targets.size(0) == logits.size(0), "token_logprobs",
        "targets must be (N,) for logits (N, V)");
  check(targets.scalar_type() == ScalarType::Long, "token_logprobs", "targets must be int64");
  check(temperature > 0, "token_logprobs", "temperature must be positive");
  if (on_device(logits)) return;
  const int64_t* target = in<int64_t>(targets);
  for (int64_t i = 0; i < logits.size(0); ++i) {
    STD_TORCH_CHECK(target[i] == ignore_index || (target[i] >= 0 && target[i] < logits.size(1)),
                    "token_logprobs: targets[", i, "] is ", target[i], ", outside the vocabulary of ", logits.size(1),
                    " (positions to skip hold ignore_index = ", ignore_index, ")");
  }
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs(const Tensor& logits_, const Tensor& targets_, double temperature,
                                                  int64_t ignore_index, bool with_entropy) {
  const Tensor targets = torch::stable::contiguous(targets_);
  check_inputs(logits_, targets, temperature, ignore_index);
  const Rows logits(logits_);
  const Tensor logprobs = empty_f32(logits_, {logits.rows}),
               entropy = empty_f32(logits_, {with_entropy ? logits.rows : 0}),
               stats = empty_f32(logits_, {2, logits.rows});
  run("token_logprobs", logits_,
      TokenLogprobs{dtype_of(logits_), in(logits.tensor), in<int64_t>(targets), out<float>(logprobs),
                    with_entropy ? out<float>(entropy) : nullptr, out<float>(stats), logits.rows, logits.dim,
                    logits.stride, ignore_index, static_cast<float>(1 / temperature)});
  return {logprobs, entropy, stats};
}

Tensor token_logprobs_backward(const std::optional<Tensor>& dlogprobs_, const std::optional<Tensor>& dentropy_,
                               const Tensor& logits_, const Tensor& targets_, const Tensor& entropy,
                               const Tensor& stats, double temperature, int64_t ignore_index) {
  const Tensor targets = torch::stable::contiguous(targets_);
  check_inputs(logits_, targets, temperature, ignore_index);
  const Rows logits(logits_);
  std::optional<Tensor> dlogprobs, dentropy;
  if (dlogprobs_) dlogprobs = torch::stable::contiguous(*dlogprobs_);
  if (dentropy_) dentropy = torch::stable::contiguous(*dentropy_);
  const int64_t rows = logits.rows;
  check((!dlogprobs || dlogprobs->numel() == rows) && stats.numel() == 2 * rows &&
            (!dentropy || (dentropy->numel() == rows && entropy.numel() == rows)),
        "token_logprobs_backward", "gradients, entropy and stats must be of the logits' rows");
  const Tensor dlogits = torch::stable::new_empty(logits_, logits_.sizes());
  run("token_logprobs_backward", logits_,
      TokenLogprobsBackward{dtype_of(logits_), dlogprobs ? in<float>(*dlogprobs) : nullptr,
                            dentropy ? in<float>(*dentropy) : nullptr, in(logits.tensor), in<int64_t>(targets),
                            in<float>(entropy), in<float>(stats), out(dlogits), logits.rows, logits.dim, logits.stride,
                            ignore_index, static_cast<float>(1 / temperature)});
  return dlogits;
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "token_logprobs(Tensor logits, Tensor targets, float temperature, int ignore_index, bool entropy) -> (Tensor "
      "logprobs, Tensor entropy, Tensor stats)");
  m.def(
      "token_logprobs_backward(Tensor? dlogprobs, Tensor? dentropy, Tensor logits, Tensor targets, Tensor entropy, "
      "Tensor stats, float temperature, int ignore_index) -> Tensor dlogits");
}
FINETUNE_KERNELS(m) {
  FINETUNE_KERNEL(m, "token_logprobs", token_logprobs);
  FINETUNE_KERNEL(m, "token_logprobs_backward", token_logprobs_backward);
}

}  // namespace finetune
