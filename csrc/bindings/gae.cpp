#include "finetune/gae.h"

#include "common.h"

namespace finetune {
namespace {

std::tuple<Tensor, Tensor> gae(const Tensor& rewards_, const Tensor& values_, const Tensor& next_values_,
                               const Tensor& terminated_, const Tensor& truncated_, double gamma, double lam) {
  check(rewards_.dim() == 2, "gae", "rewards must be (T, N)");
  for (const Tensor* t : {&values_, &next_values_, &terminated_, &truncated_}) {
    check(t->sizes().equals(rewards_.sizes()), "gae", "all must have the shape of rewards, (T, N)");
  }
  const ScalarType scalar = rewards_.scalar_type();
  check(values_.scalar_type() == scalar && next_values_.scalar_type() == scalar, "gae",
        "rewards, values and next_values must have one dtype");
  check(terminated_.scalar_type() == ScalarType::Bool && truncated_.scalar_type() == ScalarType::Bool, "gae",
        "terminated and truncated must be bool");
  const Tensor rewards = torch::stable::contiguous(rewards_), values = torch::stable::contiguous(values_),
               next_values = torch::stable::contiguous(next_values_),
               terminated = torch::stable::contiguous(terminated_), truncated = torch::stable::contiguous(truncated_);
  const bool wide = scalar == ScalarType::Double && !on_device(rewards);
  const ScalarType result = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor advantages = torch::stable::new_empty(rewards, rewards.sizes(), result),
               returns = torch::stable::new_empty(rewards, rewards.sizes(), result);
  run("gae", rewards,
      Gae{wide ? DType::f64 : dtype_of(rewards), in(rewards), in(values), in(next_values), in<bool>(terminated),
          in<bool>(truncated), out(advantages), out(returns), rewards.size(0), rewards.size(1), gamma, gamma * lam});
  return {advantages, returns};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor next_values, Tensor terminated, Tensor truncated, float gamma, float "
      "lam) -> (Tensor advantages, Tensor returns)");
}
FINETUNE_KERNELS(m) { FINETUNE_KERNEL(m, "gae", gae); }

}  // namespace finetune
