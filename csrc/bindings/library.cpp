// The library itself: torch's thread pool for the kernels, the CPU level, and how it was built.
#include "common.h"

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
  check(false, "set_cpu_level", "levels are portable, avx2, avx512, amx");
}

std::string build_info() { return FINETUNE_BUILD_INFO; }  // "key=value|…", written by CMakeLists.txt

}  // namespace

STABLE_TORCH_LIBRARY(finetune, m) {
  m.def("cpu_level() -> str");
  m.def("cpu_level_supported() -> str");
  m.def("set_cpu_level(str name) -> ()");
  m.def("build_info() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(finetune, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
  m.impl("cpu_level_supported", TORCH_BOX(&cpu_level_supported));
  m.impl("set_cpu_level", TORCH_BOX(&set_cpu_level));
  m.impl("build_info", TORCH_BOX(&build_info));
}

}  // namespace finetune
