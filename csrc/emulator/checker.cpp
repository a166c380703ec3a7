// The checked build: kernels are compiled with -fsanitize=thread, which calls a function before every load and store
// of theirs. libtsan is not linked; the functions are these.
#include "checker.h"

#include <cstring>

#define HOOK extern "C" __attribute__((used, visibility("hidden")))

namespace emulator {
namespace checker {

namespace {
bool paused = false;  // the emulator itself works on the kernel's memory
}

void stop(Place place, const std::string& what) {
  paused = true;
  end_with(resolve(place).text + ": " + what);
}

void pause(bool on) { paused = on; }

void begin_block() {
  paused = false;
  begin_regions();
  begin_order();
}

void end_block() { finish_block(); }

void end_launch() { end_call(); }

namespace {

// Memory of the emulator that kernels see without knowing: threadIdx, a launch's arguments, constants.
bool is_emulators(uintptr_t address, size_t bytes) {
  const auto within = [&](const void* begin, size_t size) {
    return address - reinterpret_cast<uintptr_t>(begin) < size;
  };
  return within(block.fibers.data(), block.fibers.size() * sizeof(Fiber)) ||
         within(block.context, block.context_bytes) || in_module_data(address, bytes);
}

constexpr const char* kMbarrierAccess = "mbarrier";

const char* verb(Access access) {
  return access == Access::read ? "reads " : access == Access::write ? "writes " : "updates ";
}

[[noreturn]] void outside(uintptr_t address, size_t bytes, Access access, Place place) {
  stop(place, verb(access) + std::to_string(bytes) + " bytes " + nearest(address, bytes));
}

void check(uintptr_t address, size_t bytes, Access access, Place place, const char* what) {
  Region* region = find(address);
  if (!region) {
    if (access == Access::read && is_emulators(address, bytes)) return;
    outside(address, bytes, access, place);
  }
  const size_t offset = address - region->begin;
  if (offset + bytes > region->bytes) outside(address, bytes, access, place);
  unsigned char all = 0xff, any = 0;
  region->each_part(address, bytes, [&](Chunk& chunk, uintptr_t at, size_t part) {
    const unsigned char* flags = chunk.flags.data() + (at - chunk.begin);
    for (size_t i = 0; i < part; ++i) {
      all &= flags[i];
      any |= flags[i];
    }
  });
  const auto where = [&] {
    return std::to_string(bytes) + " bytes at byte " + std::to_string(offset) + " of " + title(*region);
  };
  if (any & kInFlight) {
    stop(place, verb(access) + where() + ", which an asynchronous copy that was not waited for still writes");
  }
  if (any & kMbarrier && what != kMbarrierAccess) stop(place, verb(access) + where() + ", which hold an mbarrier");
  if (access != Access::read && !(all & kWritable)) stop(place, verb(access) + where() + ", which is read-only");
  if (access != Access::write && !(all & kDefined)) {
    stop(place, verb(access) + where() + ", which nobody has written yet: uninitialized, or a barrier is missing");
  }
  if (access != Access::read) {
    region->each_part(address, bytes, [&](Chunk& chunk, uintptr_t at, size_t part) {
      std::memset(chunk.flags.data() + (at - chunk.begin), all | kDefined, part);
    });
  }
  if (counting) count_access(*region, address, bytes, access, place, what);
  order(*region, address, bytes, access, place);
}

inline void hook(const void* data, size_t bytes, size_t align, Access access, const void* return_address) {
  if (!self || paused) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const Place place = place_of(return_address);
  if (address - reinterpret_cast<uintptr_t>(stacks) < kMostThreads * kStackBytes) {  // its own variables
    if (is_register_under_way(data)) {
      stop(place, std::string(verb(access)) + "a register of a wgmma under way, with no wgmma.wait_group in between");
    }
    return;
  }
  if (address % align) {
    stop(place, std::string("misaligned: ") + verb(access) + std::to_string(bytes) + " bytes at an address that is " +
                    std::to_string(address % align) + " past a multiple of " + std::to_string(align));
  }
  check(address, bytes, access, place, nullptr);
}

}  // namespace

void mbarrier_memory(const void* mbarrier, bool begins, Site site) {
  const auto address = reinterpret_cast<uintptr_t>(mbarrier);
  check(address, 8, begins ? Access::write : Access::atomic, place_of(site), kMbarrierAccess);
  if (begins) set_flags(address, 8, kMbarrier, true);
}

}  // namespace checker

void touch_constant(const void* data, int bytes, Site site) {
  using namespace checker;
  touch(data, bytes, Access::read, site);
  if (Region* region = find(reinterpret_cast<uintptr_t>(data))) {
    if (written_by_launch(*region, reinterpret_cast<uintptr_t>(data), static_cast<size_t>(bytes))) {
      stop(place_of(site), "reads, by an instruction for constant memory, what this kernel has written");
    }
  }
}

void touch(const void* data, int bytes, Access access, Site site, const char* what) {
  using namespace checker;
  if (!data || paused) return;
  check(reinterpret_cast<uintptr_t>(data), static_cast<size_t>(bytes), access, place_of(site), what);
}

}  // namespace emulator

#define HOOKS(name, bytes, align)                                                                   \
  HOOK void __tsan_##name##read##bytes(void* p) {                                                   \
    emulator::checker::hook(p, bytes, align, emulator::Access::read, __builtin_return_address(0));  \
  }                                                                                                 \
  HOOK void __tsan_##name##write##bytes(void* p) {                                                  \
    emulator::checker::hook(p, bytes, align, emulator::Access::write, __builtin_return_address(0)); \
  }
HOOKS(, 1, 1)
HOOKS(, 2, 2)
HOOKS(, 4, 4)
HOOKS(, 8, 8)
HOOKS(, 16, 16)
HOOKS(unaligned_, 2, 1)  // of types that need no alignment
HOOKS(unaligned_, 4, 1)
HOOKS(unaligned_, 8, 1)
HOOKS(unaligned_, 16, 1)
HOOK void __tsan_read_range(void* p, size_t bytes) {
  emulator::checker::hook(p, bytes, 1, emulator::Access::read, __builtin_return_address(0));
}
HOOK void __tsan_write_range(void* p, size_t bytes) {
  emulator::checker::hook(p, bytes, 1, emulator::Access::write, __builtin_return_address(0));
}
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}
