// What the emulator's own files share: the running block and its fibers.
#pragma once

#include <vector>

#include "emulator.h"

namespace emulator {

constexpr int kMostThreads = 1024, kWarp = 32;
constexpr size_t kSharedBytes = 227 * 1024;  // what a block may have on sm_90
constexpr size_t kStackBytes =
#if defined(__SANITIZE_ADDRESS__)
    256 * 1024;
#else
    64 * 1024;
#endif

enum class State {
  ready,
  at_barrier,
  at_named_barrier,
  at_collective,
  at_warpgroup,
  at_mbarrier,
  at_registers,
  exited
};

struct Copy {
  void* to;
  const void* from;
  int bytes, bytes_read;
  Site site;
};

struct Fiber {
  void* stack_pointer;
  State state;
  unsigned id, lane, warp;  // within the block
  uint3 index;
  Site site;              // where it waits
  int barrier, expected;  // the named barrier it waits at, and for how many threads
  // its part in a warp's collective
  uint32_t mask;
  void (*run)(void* const*, uint32_t, Site);
  void* part;
  // asynchronous copies: those not committed, and the committed groups, oldest first
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  void* fake_stack;  // AddressSanitizer's
};

struct Block {
  dim3 grid, size;
  uint3 index;
  unsigned threads, exited, at_barrier;  // at_barrier: waiting at the block's barrier
  std::vector<Fiber> fibers;
  const void* kernel;
  void (*body)(void*);
  void* context;  // of `body`: the kernel's arguments
  size_t context_bytes;
  size_t dynamic_bytes;
};

extern Block block;
extern Fiber* self;                  // the running fiber
extern unsigned char* stacks;        // kMostThreads of kStackBytes
extern unsigned char* arena;         // shared memory: dynamic first, then the static arrays
void yield(State state, Site site);  // waits until somebody makes this fiber ready

bool is_register_under_way(const void* variable);  // of a product of the running thread's warpgroup (wgmma.cpp)

[[noreturn]] void end_with(const std::string& what);  // the launch, by a fault of the running thread

// The checked build's view of what happens (checker.h); nothing in the others.
namespace checker {
#if defined(EMULATOR_checked)
void begin_launch();
void begin_block();
void end_block();
void end_launch();
void new_shared(const void* data, size_t bytes, const char* name);
void join_block();                              // all threads passed a barrier
void join(const unsigned* threads, int count);  // these threads passed a barrier of theirs
// mbarriers: the running thread arrives, a phase is complete, the running thread has waited for it and comes after all
// that arrived in it. The 8 bytes of one are its own from `begins` on.
void arrive(const void* mbarrier);
void complete(const void* mbarrier);
void acquire(const void* mbarrier);
void mbarrier_memory(const void* mbarrier, bool begins, Site site);
void proxy_fence();  // the running thread's
// Asynchronous units: what follows is done by `unit`, given to it by that number of threads, which knows what all of them know
// (or, again, what it knew); until it acts no more. next_time: what it did until now was at this time, what follows is
// later. land: a copy's bytes are counted at its mbarrier. learn: these threads have waited for the unit, to that time.
void act_as(const void* unit, unsigned first, unsigned count);
void act_again(const void* unit);
void act_no_more();
uint32_t next_time(const void* unit);
void land(const void* unit, const void* mbarrier);
void learn(const void* unit, uint32_t time, unsigned first, unsigned count);
void in_flight(const void* shared, int bytes, bool begins, Site site);
void pause(bool on);  // the emulator itself works on the kernel's memory
#else
inline void begin_launch() {}
inline void begin_block() {}
inline void end_block() {}
inline void end_launch() {}
inline void new_shared(const void*, size_t, const char*) {}
inline void join_block() {}
inline void join(const unsigned*, int) {}
inline void arrive(const void*) {}
inline void complete(const void*) {}
inline void acquire(const void*) {}
inline void mbarrier_memory(const void*, bool, Site) {}
inline void proxy_fence() {}
inline void act_as(const void*, unsigned, unsigned) {}
inline void act_again(const void*) {}
inline void act_no_more() {}
inline uint32_t next_time(const void*) { return 0; }
inline void land(const void*, const void*) {}
inline void learn(const void*, uint32_t, unsigned, unsigned) {}
inline void in_flight(const void*, int, bool, Site) {}
inline void pause(bool) {}
#endif
}  // namespace checker

}  // namespace emulator
