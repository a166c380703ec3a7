#include "finetune/token_logprobs.h"

#include "common.h"

namespace finetune {
namespace {

void check_inputs(const Tensor& logits, const Tensor& targets, double temperature) {
  check(logits.dim() == 2, "token_logprobs", "logits must be (N, V)");
  check(targets.dim() == 1 && targets.size(0) == logits.size(0), "token_logprobs",
        "targets must be (N,) for logits (N, V)");
  check(targets.scalar_type() == ScalarType::Long, "token_logprobs", "targets must be int64");
  check(temperature > 0, "token_logprobs", "temperature must be positive");
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs(const Tensor& logits_, const Tensor& targets_, double temperature,
                                                  int64_t ignore_index, bool with_entropy) {
  check_inputs(logits_, targets_, temperature);
  const Rows logits(logits_);
  const Tensor targets = torch::stable::contiguous(targets_);
  if (!on_device(logits_)) {  // a device would have to be waited for: its kernel marks such rows with NaN
    const int64_t* target = targets.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < logits.rows; ++i) {
      STD_TORCH_CHECK(target[i] == ignore_index || (target[i] >= 0 && target[i] < logits.dim),
                      "token_logprobs: targets[", i, "] is ", target[i], ", outside the vocabulary of ", logits.dim,
                      " (positions to skip hold ignore_index = ", ignore_index, ")");
    }
  }
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
  check_inputs(logits_, targets_, temperature);
  const Rows logits(logits_);
  const Tensor targets = torch::stable::contiguous(targets_);
  std::optional<Tensor> dlogprobs, dentropy;
  if (dlogprobs_) dlogprobs = torch::stable::contiguous(*dlogprobs_);
  if (dentropy_) dentropy = torch::stable::contiguous(*dentropy_);
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
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
}

}  // namespace finetune
