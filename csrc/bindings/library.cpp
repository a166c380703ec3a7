// The library itself: torch's thread pool for the kernels, the CPU level, how it was built, and the sizes that the
// memory formulas need (finetune/memory).
#include "common.h"
#include "finetune/linear_cross_entropy.h"

namespace finetune {
namespace {

void torch_parallel_for(int64_t tasks, int64_t grain, Body body, void* context) {
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

int torch_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

[[maybe_unused]] const bool pool_is_set = (set_thread_pool(torch_parallel_for, torch_threads), true);

std::string cpu_level() { return kLevelNames[static_cast<int>(level())]; }

std::string cpu_level_supported() { return kLevelNames[static_cast<int>(supported_level())]; }

void set_cpu_level(std::string name) {
  for (int at = 0; at < kLevels; ++at) {
    if (name == kLevelNames[at]) {
      check(set_level(static_cast<Level>(at)), "set_cpu_level", "this machine does not support that level");
      return;
    }
  }
  check(false, "set_cpu_level", "levels are portable, avx2, avx512, avx512vnni, amx");
}

std::string build_info() { return FINETUNE_BUILD_INFO; }  // "key=value|…", written by CMakeLists.txt

std::tuple<int64_t, int64_t, int64_t> linear_cross_entropy_plan(int64_t n_rows, int64_t vocab, bool bf16_matmul) {
  const LossPlan plan = LossPlan::of(n_rows, vocab, bf16_matmul ? DType::bf16 : DType::f32);
  return {plan.chunk, plan.tiles, plan.blocks};
}

}  // namespace

STABLE_TORCH_LIBRARY(finetune, m) {
  m.def("cpu_level() -> str");
  m.def("cpu_level_supported() -> str");
  m.def("set_cpu_level(str name) -> ()");
  m.def("build_info() -> str");
  m.def("linear_cross_entropy_plan(int n_rows, int vocab, bool bf16_matmul) -> (int chunk, int tiles, int blocks)");
}
STABLE_TORCH_LIBRARY_IMPL(finetune, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
  m.impl("cpu_level_supported", TORCH_BOX(&cpu_level_supported));
  m.impl("set_cpu_level", TORCH_BOX(&set_cpu_level));
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("linear_cross_entropy_plan", TORCH_BOX(&linear_cross_entropy_plan));
}

}  // namespace finetune
