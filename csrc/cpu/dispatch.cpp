// Which level this machine runs, and whose threads the kernels use.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "finetune/kernel.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace finetune {
namespace {

#if defined(FINETUNE_AMX)  // the compiler knew AMX when this was built
// AMX state is off until the process asks the kernel for it (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA = 18).
bool amx_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Level detect() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(FINETUNE_AVX512VNNI)
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#if defined(FINETUNE_AMX)
  const bool amx = vnni && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8");
  if (amx && amx_permitted()) return Level::amx;
#endif
  if (vnni) return Level::avx512vnni;
#endif
  if (avx512) return Level::avx512;
  if (avx2) return Level::avx2;
#endif
  return Level::portable;
}

// FINETUNE_CPU=portable|avx2|avx512|avx512vnni|amx lowers the level; a level the machine lacks is refused by the Python
// side at import, where there is somebody to tell, so here it is only ignored.
Level initial() {
  const char* wanted = std::getenv("FINETUNE_CPU");
  for (int at = 0; wanted && at < kLevels; ++at) {
    if (std::strcmp(wanted, kLevelNames[at]) == 0 && at <= static_cast<int>(supported_level())) {
      return static_cast<Level>(at);
    }
  }
  return supported_level();
}

std::atomic<Level>& current() {
  static std::atomic<Level> value{initial()};
  return value;
}

ParallelFor pool = nullptr;
int (*pool_threads)() = nullptr;

}  // namespace

Level supported_level() {
  static const Level detected = detect();
  return detected;
}

Level level() { return current().load(std::memory_order_relaxed); }

bool set_level(Level at) {
  if (at > supported_level()) return false;
  current() = at;
  return true;
}

void set_thread_pool(ParallelFor parallel_for, int (*threads)()) {
  pool = parallel_for;
  pool_threads = threads;
}

void run_parallel(int64_t tasks, int64_t grain, Body body, void* context) {
  if (tasks <= 0) return;
  if (pool) {
    pool(tasks, grain, body, context);
  } else {
    body(0, tasks, context);
  }
}

int threads() { return pool_threads ? pool_threads() : 1; }

}  // namespace finetune
