// Threads that go through the phases of one call together, in one parallel region of the framework's pool.
//
// A phase is a number of units of work. A thread takes some, then some more, until none is left, and waits until all
// are done. Nobody waits for a thread that holds no work: one that starts late, or whose core the system gave to another
// process, finds the phases done that went on without it, and hurries after the others. A barrier that all threads must
// reach would instead last, in each of the 200 phases of a token, until the system gives that core back.
//
// Who waits first spins, for about 20 µs; then sleeps (futex), so that the thread it waits for can have its core.
#pragma once

#include <cstdint>

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

struct Phase {  // zero at first
  alignas(64) uint32_t taken;
  uint32_t done;  // units
};

struct Team {
  static constexpr int64_t kSingle = 0;
  int64_t workers;  // at most
  Phase* phases;    // at least as many as the body goes through, the same ones on every thread
  alignas(64) uint32_t sleeping = 0;

  // body(worker) on as many threads as the framework gives.
  template <class Body>
  void run(Body&& body) {
    parallel_for(workers, 1, [&](int64_t begin, int64_t) { body(begin); });
  }

  // body(first, last) for parts of [0, units): three quarters in one part a thread, the rest in `small_parts` ones a
  // thread for those that are done early. With kSingle every part is one unit.
  template <class Body>
  void each(int64_t phase, int64_t units, int64_t small_parts, Body&& body) {
    if (workers == 1) {
      if (units) body(0, units);
      return;
    }
    Phase& p = phases[phase];
    const int64_t large = small_parts == kSingle ? 0 : units * 3 / (4 * workers), rest = units - large * workers,
                  small = small_parts == kSingle ? 1 : (rest + small_parts * workers - 1) / (small_parts * workers);
    uint32_t mine = 0;
    while (true) {
      const int64_t part = __atomic_fetch_add(&p.taken, 1, __ATOMIC_RELAXED);
      const int64_t first = part < workers ? part * large : large * workers + (part - workers) * small;
      const int64_t size = part < workers ? large : small, last = first + size < units ? first + size : units;
      if (part >= workers && first >= units) break;
      if (first < last) body(first, last), mine += static_cast<uint32_t>(last - first);
    }
    const auto all = static_cast<uint32_t>(units);
    if (mine && __atomic_add_fetch(&p.done, mine, __ATOMIC_SEQ_CST) == all) {
      if (__atomic_load_n(&sleeping, __ATOMIC_SEQ_CST)) wake(&p.done);
      return;
    }
    for (int i = 0; i < 1500; ++i) {
      if (__atomic_load_n(&p.done, __ATOMIC_ACQUIRE) == all) return;
      relax();
    }
    __atomic_add_fetch(&sleeping, 1, __ATOMIC_SEQ_CST);
    for (uint32_t now; (now = __atomic_load_n(&p.done, __ATOMIC_SEQ_CST)) != all;) sleep(&p.done, now);
    __atomic_sub_fetch(&sleeping, 1, __ATOMIC_SEQ_CST);
  }

 private:
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
