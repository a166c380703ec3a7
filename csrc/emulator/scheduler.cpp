// Fibers, barriers, warp collectives, shared memory and asynchronous copies: how a grid runs.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>

#include "hopper.h"
#include "state.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

Block block;
Fiber* self = nullptr;
unsigned char *stacks = nullptr, *arena = nullptr;

namespace {

std::string message;  // of the fault, if there was one
bool failed = false;
Options chosen;

struct SharedArray {
  const void* key;
  size_t offset;
};
std::vector<SharedArray> arrays;  // of the running block
size_t used = 0;                  // of the arena
size_t static_bytes = 0;          // of the arrays

constexpr size_t kRedZone = 64;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating type

// --- switching

#if defined(__x86_64__)
extern "C" void emulator_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
void* scheduler = nullptr;  // its stack pointer while a fiber runs

void* prepare(unsigned char* top, void (*entry)()) {
  auto** slot = reinterpret_cast<void**>(top);  // 16-byte aligned; at a function's entry rsp is 8 past a multiple of 16
  slot[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) slot[-i] = nullptr;
  return slot - 8;
}
void enter(Fiber& fiber) { emulator_switch(&scheduler, fiber.stack_pointer); }
void leave(Fiber& fiber) { emulator_switch(&fiber.stack_pointer, scheduler); }
#else
std::vector<ucontext_t> contexts(kMostThreads);
ucontext_t scheduler;

void* prepare(unsigned char* top, void (*entry)()) {
  const size_t id = (top - stacks) / kStackBytes - 1;
  getcontext(&contexts[id]);
  contexts[id].uc_stack.ss_sp = top - kStackBytes;
  contexts[id].uc_stack.ss_size = kStackBytes;
  contexts[id].uc_link = nullptr;
  makecontext(&contexts[id], entry, 0);
  return &contexts[id];
}
void enter(Fiber& fiber) { swapcontext(&scheduler, static_cast<ucontext_t*>(fiber.stack_pointer)); }
void leave(Fiber& fiber) { swapcontext(static_cast<ucontext_t*>(fiber.stack_pointer), &scheduler); }
#endif

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void* scheduler_fake = nullptr;
#endif

void resume(Fiber& fiber) {
  self = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake, stacks + fiber.id * kStackBytes, kStackBytes);
#endif
  enter(fiber);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
  self = nullptr;
}

void suspend() {
  Fiber& fiber = *self;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.state == State::exited ? nullptr : &fiber.fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
#endif
  leave(fiber);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  block.body(block.context);
  self->state = State::exited;
  ++block.exited;
  suspend();
  __builtin_unreachable();
}

// --- text

std::string at(Site site) {
  const char* name = site.file ? site.file : "?";
  if (const char* slash = std::strrchr(name, '/')) name = slash + 1;
  return std::string(name) + ":" + std::to_string(site.line);
}

std::string who(const Fiber& fiber) {
  const uint3 &t = fiber.index, &b = block.index;
  auto three = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  return "thread " + three(t.x, t.y, t.z) + " of block " + three(b.x, b.y, b.z);
}

// Nobody can go on: says who waits where.
std::string deadlock() {
  std::string text = "deadlock:";
  std::vector<std::pair<std::string, int>> places;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state == State::exited) continue;
    const char* what = fiber.state == State::at_barrier         ? "a block barrier"
                       : fiber.state == State::at_named_barrier ? "a named barrier"
                       : fiber.state == State::at_mbarrier      ? "an mbarrier"
                       : fiber.state == State::at_registers     ? "setmaxnreg"
                       : fiber.state == State::at_warpgroup     ? "a warpgroup's instruction"
                                                                : "a warp collective";
    const std::string place = std::string(what) + " at " + at(fiber.site);
    auto found = std::find_if(places.begin(), places.end(), [&](auto& p) { return p.first == place; });
    found == places.end() ? places.emplace_back(place, 1), void() : void(++found->second);
  }
  for (const auto& [place, count] : places) text += " " + std::to_string(count) + " threads wait at " + place + ",";
  return text + " " + std::to_string(block.exited) + " have exited";
}

void report(const std::string& what) {
  if (!failed) message = what;
  failed = true;
}

// --- barriers

void release_block_barrier() {
  if (block.at_barrier + block.exited < block.threads) return;
  const Fiber* first = nullptr;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state == State::exited) continue;
    if (!first) first = &fiber;
    if (fiber.site.line != first->site.line || std::strcmp(fiber.site.file, first->site.file) != 0) {
      report("divergent barrier: " + who(*first) + " is at " + at(first->site) + ", " + who(fiber) + " at " +
             at(fiber.site));
      return;
    }
  }
  checker::join_block();
  join_asynchronous();
  block.at_barrier = 0;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::at_barrier) fiber.state = State::ready;
  }
}

std::vector<unsigned> order() {
  std::vector<unsigned> ids(block.threads);
  for (unsigned i = 0; i < block.threads; ++i) ids[i] = chosen.order == 1 ? block.threads - 1 - i : i;
  if (chosen.order > 1) {
    std::mt19937 random(static_cast<unsigned>(chosen.order));
    std::shuffle(ids.begin(), ids.end(), random);
  }
  return ids;
}

void run_block(const std::vector<unsigned>& ids) {
  arrays.clear();
  used = block.dynamic_bytes;
  static_bytes = 0;
  std::memset(arena, kPoison, used + kRedZone);
  checker::begin_block();
  begin_asynchronous();
  if (block.dynamic_bytes) checker::new_shared(arena, block.dynamic_bytes, "dynamic shared memory");
  block.exited = block.at_barrier = 0;
  for (Fiber& fiber : block.fibers) {
    fiber.state = State::ready;
    fiber.open.clear();
    fiber.groups.clear();
    fiber.fake_stack = nullptr;
    fiber.stack_pointer = prepare(stacks + (fiber.id + 1) * kStackBytes, thread_main);
  }
  while (block.exited < block.threads) {
    bool progress = false;
    for (const unsigned id : ids) {
      if (block.fibers[id].state != State::ready) continue;
      progress = true;
      resume(block.fibers[id]);
      if (failed) return;
    }
    if (!progress) {
      release_block_barrier();  // where threads have exited, the last to arrive could not know
      if (failed) return;
      if (land_one()) continue;
      const bool stuck = std::none_of(block.fibers.begin(), block.fibers.end(),
                                      [](const Fiber& fiber) { return fiber.state == State::ready; });
      if (stuck) {
        report(deadlock());
        return;
      }
    }
  }
  if (*unfinished()) report(unfinished());
}

void* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return memory;
}

}  // namespace

void yield(State state, Site site) {
  self->state = state;
  self->site = site;
  suspend();
}

void end_with(const std::string& what) {
  report(what + ", by " + who(*self));
  suspend();  // and is never resumed: what a kernel has on its stack needs no destructor
  __builtin_unreachable();
}

void fault(const char* what, Site site) { end_with(at(site) + ": " + what); }

namespace {
enum Space : unsigned { kGlobal = 1, kShared = 2, kLocal = 4 };
const char* name_of(Space space) {
  return space == kGlobal ? "a global" : space == kShared ? "a shared" : "a thread's own";
}
void require(unsigned spaces, const void* p, int align, const char* what, Site site) {
  const auto within = [&](const unsigned char* begin, size_t bytes) {
    return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(begin) < bytes;
  };
  const Space space = within(arena, 2 * kSharedBytes)              ? kShared
                      : within(stacks, kMostThreads * kStackBytes) ? kLocal
                                                                   : kGlobal;
  if (!(space & spaces)) fault((std::string(name_of(space)) + " address given to " + what).c_str(), site);
  if (const uintptr_t past = reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(align)) {
    fault(("misaligned: " + std::string(what) + " at an address that is " + std::to_string(past) +
           " past a multiple of " + std::to_string(align))
              .c_str(),
          site);
  }
}
}  // namespace

void require_global(const void* p, int align, const char* what, Site site) { require(kGlobal, p, align, what, site); }
void require_shared(const void* p, int align, const char* what, Site site) { require(kShared, p, align, what, site); }
void require_memory(const void* p, int align, const char* what, Site site) {
  require(kGlobal | kShared, p, align, what, site);
}

std::string take_fault() {
  checker::end_launch();
  failed = false;
  return std::exchange(message, {});
}

Options& options() { return chosen; }

namespace {
std::string reached;  // the fault that a kernel last asked for and got
uint64_t largest_grid = 0;
}  // namespace
bool bug(const char* name) {
  if (chosen.bug.empty() || chosen.bug != name) return false;
  reached = name;
  return true;
}
uint64_t take_largest_grid() { return std::exchange(largest_grid, 0); }
bool bug_reached() { return !chosen.bug.empty() && reached == chosen.bug; }

bool run_grid(const void* kernel, dim3 grid, dim3 size, size_t shared_bytes, void (*body)(void*), void* context,
              size_t context_bytes) {
  if (failed) return false;
  const uint64_t threads = uint64_t{size.x} * size.y * size.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (!threads || threads > kMostThreads || size.z > 64 || !blocks || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > kSharedBytes) {
    report("a launch that no GPU accepts: grid (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
           std::to_string(grid.z) + "), " + std::to_string(threads) + " threads a block, " +
           std::to_string(shared_bytes) + " bytes of dynamic shared memory");
    return false;
  }
  if (!stacks) {
    stacks = static_cast<unsigned char*>(map(kMostThreads * kStackBytes));
    arena = static_cast<unsigned char*>(map(2 * kSharedBytes));
    arena += (1024 - reinterpret_cast<uintptr_t>(arena) % 1024) % 1024;
  }
  largest_grid = std::max(largest_grid, blocks);
  block.grid = grid;
  block.size = size;
  block.threads = static_cast<unsigned>(threads);
  block.kernel = kernel;
  block.body = body;
  block.context = context;
  block.context_bytes = context_bytes;
  block.dynamic_bytes = shared_bytes;
  block.fibers.resize(threads);
  for (unsigned id = 0; id < threads; ++id) {
    Fiber& fiber = block.fibers[id];
    fiber.id = id;
    fiber.lane = id % kWarp;
    fiber.warp = id / kWarp;
    fiber.index = {id % size.x, id / size.x % size.y, id / (size.x * size.y)};
  }
  checker::begin_launch();
  const std::vector<unsigned> ids = order();
  for (unsigned z = 0; z < grid.z && !failed; ++z) {
    for (unsigned y = 0; y < grid.y && !failed; ++y) {
      for (unsigned x = 0; x < grid.x && !failed; ++x) {
        block.index = {x, y, z};
        run_block(ids);
        if (!failed) checker::end_block();
      }
    }
  }
  return !failed;
}

// --- what a kernel asks

const uint3& thread_index() { return self->index; }
const uint3& block_index() { return block.index; }
const dim3& block_size() { return block.size; }
const dim3& grid_size() { return block.grid; }
unsigned lane_index() { return self->lane; }

void block_barrier(Site site) {
  self->state = State::at_barrier;
  self->site = site;
  ++block.at_barrier;
  if (self->lane == 0) count("__syncthreads", site);
  release_block_barrier();
  if (failed || self->state != State::ready) suspend();
}

// All lanes of the warp come by this line together, which orders nothing.
static void converge(Site site) {
  collective(0xffffffffu, [](void* const*, uint32_t, Site) {}, self, site, nullptr, true);
}

void named_barrier(int id, int threads, Site site) {
  if (id < 1 || id > 15 || threads < kWarp || threads % kWarp || threads > static_cast<int>(block.threads)) {
    fault("a named barrier is 1 to 15, for whole warps of the block", site);
  }
  if (self->lane == 0) count("bar.sync", site);
  converge(site);  // .aligned
  self->state = State::at_named_barrier;
  self->barrier = id;
  self->expected = threads;
  self->site = site;
  std::vector<unsigned> here;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state != State::at_named_barrier || fiber.barrier != id) continue;
    if (fiber.expected != threads) fault("threads of one named barrier expect different numbers of threads", site);
    here.push_back(fiber.id);
  }
  if (static_cast<int>(here.size()) == threads) {
    checker::join(here.data(), threads);
    for (const unsigned other : here) block.fibers[other].state = State::ready;
  } else {
    suspend();
  }
}

void collective(uint32_t mask, void (*run)(void* const*, uint32_t, Site), void* part, Site site, const char* what,
                bool aligned) {
  Fiber& me = *self;
  if (!(mask >> me.lane & 1)) fault("a warp collective whose mask leaves out the lane that calls it", site);
  me.mask = mask;
  me.run = run;
  me.part = part;
  me.state = State::at_collective;
  me.site = site;
  void* parts[kWarp] = {};
  const unsigned first = me.warp * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= block.threads) fault("a warp collective whose mask names lanes that do not exist", site);
    const Fiber& other = block.fibers[first + lane];
    if (other.state == State::exited) fault("a warp collective whose mask names a lane that has exited", site);
    if (other.state != State::at_collective || other.mask != mask) return suspend();
    if (other.run != run ||
        (aligned && (other.site.line != site.line || std::strcmp(other.site.file, site.file) != 0))) {
      end_with(at(site) + ": lanes of one warp meet in different collectives, here and at " + at(other.site));
    }
    parts[lane] = other.part;
  }
  checker::pause(true);
  run(parts, mask, site);
  checker::pause(false);
  count(what, site);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (parts[lane]) block.fibers[first + lane].state = State::ready;
  }
}

void warp_barrier(uint32_t mask, Site site) {
  collective(
      mask,
      [](void* const*, uint32_t lanes, Site) {
        unsigned ids[kWarp];
        int count = 0;
        for (unsigned lane = 0; lane < kWarp; ++lane) {
          if (lanes >> lane & 1) ids[count++] = self->warp * kWarp + lane;
        }
        checker::join(ids, count);
      },
      self, site, "__syncwarp");
}

void* shared_array(const void* key, size_t bytes, size_t align, const char* name, Site site) {
  for (const SharedArray& array : arrays) {
    if (array.key == key) return arena + array.offset;
  }
  const size_t offset = (used + kRedZone + align - 1) / align * align;
  static_bytes += bytes;
  if (static_bytes > 48 * 1024) fault("more than 48 KiB of static shared memory", site);
  if (static_bytes + block.dynamic_bytes > kSharedBytes) fault("more than 227 KiB of shared memory", site);
  std::memset(arena + used, kPoison, offset + bytes + kRedZone - used);
  used = offset + bytes;
  arrays.push_back({key, offset});
  checker::new_shared(arena + offset, bytes, name);
  return arena + offset;
}

void* dynamic_shared() { return arena; }
size_t dynamic_shared_bytes() { return block.dynamic_bytes; }

// --- asynchronous copies

namespace {
void make(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes_read);
  std::memset(static_cast<char*>(copy.to) + copy.bytes_read, 0, copy.bytes - copy.bytes_read);
}
}  // namespace

void copy_async(void* shared, const void* global, int bytes, int bytes_read, Site site) {
  require_shared(shared, bytes, "cp.async's destination", site);
  require_global(global, bytes, "cp.async's source", site);  // also where nothing is read
  if (bytes_read) touch(global, bytes_read, Access::read, site, "cp.async from global");
  touch(shared, bytes, Access::write, site, "cp.async to shared");
  const Copy copy{shared, global, bytes, bytes_read, site};
  if (chosen.eager) make(copy);
  checker::in_flight(shared, bytes, true, site);
  self->open.push_back(copy);
}

void copy_commit() {
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

void copy_wait(int groups_left, Site site) {
  auto& groups = self->groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) {
      if (!chosen.eager) make(copy);
      checker::in_flight(copy.to, copy.bytes, false, site);
    }
    groups.erase(groups.begin());
  }
}

#if !defined(EMULATOR_checked)
void allow(const void*, int64_t, Use) {}
void touch(const void*, int, Access, Site, const char*) {}
void touch_constant(const void*, int, Site) {}
void count(const char*, Site) {}
void set_counting(bool) {}
std::vector<Row> statistics() { return {}; }
#endif

}  // namespace emulator
