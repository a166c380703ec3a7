// Threads that go through the phases of one call together: one parallel region of the framework's pool, and a barrier
// between phases that costs a fraction of a microsecond while every thread has a core, and no core while one has none.
//
// A waiting thread first spins, for about 20 µs; then it sleeps (futex), so that the system can give its core to the
// thread it waits for. Barriers that only spin collapse when another process takes a core: each of the 150 of a token
// would last until that process is interrupted.
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include "finetune/kernel.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Team {
  alignas(64) uint32_t arrived = 0;
  alignas(64) uint32_t phase = 0;  // changes when all have arrived
  alignas(64) uint32_t sleeping = 0;
  alignas(64) int64_t workers = 0;  // 0: not known yet

  // Every worker calls it; nobody returns before all have called. What was written before is seen after.
  void wait() {
    if (workers == 1) return;
    const uint32_t now = __atomic_load_n(&phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == static_cast<uint32_t>(workers)) {
      arrived = 0;
      __atomic_store_n(&phase, now + 1, __ATOMIC_SEQ_CST);
      if (__atomic_load_n(&sleeping, __ATOMIC_SEQ_CST)) wake(&phase);
    } else {
      until([&] { return __atomic_load_n(&phase, __ATOMIC_ACQUIRE) != now; }, &phase, now);
    }
  }

  // body(worker) on as many threads as the framework gives, up to `most`; `workers` says how many there are.
  template <class Body>
  void run(int64_t most, Body&& body) {
    workers = 0;
    parallel_for(most, 1, [&](int64_t begin, int64_t end) {
      // The ranges are equally long but for the last, so the first thread knows how many there are. All run at once.
      int64_t each = end - begin;
      if (begin == 0) {
        range = each;
        const int64_t count = (most + each - 1) / each;
        __atomic_store_n(&workers, count, __ATOMIC_RELEASE);
        __atomic_store_n(&phase, phase + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&sleeping, __ATOMIC_SEQ_CST)) wake(&phase);
      } else {
        const uint32_t now = __atomic_load_n(&phase, __ATOMIC_ACQUIRE);
        if (!__atomic_load_n(&workers, __ATOMIC_ACQUIRE)) {
          until([&] { return __atomic_load_n(&workers, __ATOMIC_ACQUIRE) != 0; }, &phase, now);
        }
        each = range;
      }
      body(begin / each);
    });
  }

 private:
  int64_t range = 0;

  template <class Done>
  void until(Done&& done, uint32_t* word, uint32_t old) {
    for (int i = 0; i < 1500; ++i) {
      if (done()) return;
      relax();
    }
    __atomic_add_fetch(&sleeping, 1, __ATOMIC_SEQ_CST);
    while (!done()) sleep(word, old);
    __atomic_sub_fetch(&sleeping, 1, __ATOMIC_SEQ_CST);
  }

#if defined(__linux__)
  static void sleep(uint32_t* word, uint32_t old) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  }
  static void wake(uint32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0); }
#else
  static void sleep(uint32_t*, uint32_t) { sched_yield(); }
  static void wake(uint32_t*) {}
#endif
};

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
