// Which access comes after which (happens-before, as in FastTrack, Flanagan & Freund, PLDI 2009). A block barrier
// orders all threads of the block: it begins a new phase, and what an earlier phase did is ordered. Within a phase
// every thread has its own time and knows the times of others that it heard of through warp barriers, named barriers
// and mbarriers. Shuffles, votes and atomics order nothing. Blocks of one launch are never ordered, launches always.
#include <algorithm>
#include <unordered_map>

#include "checker.h"

namespace emulator::checker {

namespace {

uint32_t phase = 0, block_phase = 0, launch_phase = 0;  // the current one, the first of the block, of the launch
std::vector<std::pair<uint32_t, uint3>> blocks;         // of the launch: their first phases

using Clock = std::vector<uint32_t>;  // by thread: how much of it is known to have happened
struct Known {
  uint32_t phase = 0;  // in which `times` says anything
  Clock times;
};
std::vector<uint32_t> now;                        // each thread's own time in this phase, from 1
std::vector<Known> known;                         // by thread
std::unordered_map<const void*, Known> released;  // by synchronisation object

constexpr uint32_t kThreadBits = 10;
static_assert(kMostThreads <= 1 << kThreadBits);

Clock& times(Known& k) {
  if (k.phase != phase) {
    k.phase = phase;
    k.times.assign(block.threads, 0);
  }
  return k.times;
}

void merge(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

uint32_t thread_of(const Stamp& s) { return s.who & (kMostThreads - 1); }
uint32_t warp_of(const Stamp& s) { return thread_of(s) / kWarp; }
bool other_block(const Stamp& s) { return s.phase < block_phase; }

// Does what the running thread does now come after `s`?
bool before(const Stamp& s, bool shared) {
  if (s.phase < launch_phase) return true;
  if (s.phase < block_phase) return shared;  // another block, whose shared memory is not this one
  if (s.phase < phase || thread_of(s) == self->id) return true;
  const Known& mine = known[self->id];
  return mine.phase == phase && mine.times[thread_of(s)] >= s.who >> kThreadBits;
}

void remember(Cell& cell, const Stamp& s) {
  Stamp* r = cell.readers;
  const bool same_block = r[0].phase && !other_block(r[0]);
  if (same_block && thread_of(r[0]) == thread_of(s)) {
    r[0] = s;
  } else if (same_block && warp_of(r[0]) == warp_of(s)) {
    r[1] = r[0];
    r[0] = s;
  } else {
    r[2] = r[0];
    r[1] = {};
    r[0] = s;
  }
}

std::string who(const Stamp& s) {
  uint3 at = block.index;
  for (const auto& [first, index] : blocks) {
    if (first <= s.phase) at = index;
  }
  const unsigned id = thread_of(s);
  const dim3& size = block.size;
  return "thread (" + std::to_string(id % size.x) + ", " + std::to_string(id / size.x % size.y) + ", " +
         std::to_string(id / (size.x * size.y)) + ") of block (" + std::to_string(at.x) + ", " + std::to_string(at.y) +
         ", " + std::to_string(at.z) + ")";
}

[[noreturn]] void race(const Region& region, uintptr_t address, Access access, Place place, const Stamp& other,
                       bool other_wrote) {
  const char* mine = access == Access::read ? "reads" : access == Access::write ? "writes" : "updates atomically";
  const char* theirs = other.place & kAtomic ? "updated atomically" : other_wrote ? "wrote" : "read";
  stop(place, "race: " + std::string(mine) + " byte " + std::to_string(address - region.begin) + " of " +
                  title(region) + ", which " + who(other) + " " + theirs + " at " + resolve(other.place).text +
                  (other_block(other) ? " (blocks are not ordered)" : " with no barrier in between"));
}

void refine(Region& region, unsigned shift) {
  const uintptr_t origin = region.begin & ~uintptr_t{15};
  const size_t count = ((region.begin + region.bytes - origin) >> shift) + 1;
  std::vector<Cell> finer(count);
  for (size_t i = 0; i < count && !region.cells.empty(); ++i) finer[i] = region.cells[i >> (region.shift - shift)];
  region.cells = std::move(finer);
  region.shift = shift;
}

}  // namespace

void order(Region& region, uintptr_t address, size_t bytes, Access access, Place place) {
  unsigned shift = region.shift;
  while ((address | bytes) & ((size_t{1} << shift) - 1)) --shift;
  if (shift < region.shift || region.cells.empty()) refine(region, shift);
  const bool atomic = access == Access::atomic, shared = region.shared;
  const Stamp mine{phase, now[self->id] << kThreadBits | self->id, place | (atomic ? kAtomic : 0)};
  const uintptr_t origin = region.begin & ~uintptr_t{15};
  const size_t step = size_t{1} << region.shift;
  for (uintptr_t at = address; at < address + bytes; at += step) {
    Cell& cell = region.cells[(at - origin) >> region.shift];
    const bool after_writer = before(cell.writer, shared);
    if (!after_writer && !(atomic && cell.writer.place & kAtomic)) race(region, at, access, place, cell.writer, true);
    for (const Stamp& reader : cell.readers) {  // an atomic may stand among the readers, and conflicts with reads too
      const bool theirs = reader.place & kAtomic, conflict = access == Access::read ? theirs : !(atomic && theirs);
      if (conflict && !before(reader, shared)) race(region, at, access, place, reader, false);
    }
    if (access == Access::read) {
      remember(cell, mine);
    } else {
      if (!atomic) {
        cell.readers[0] = cell.readers[1] = cell.readers[2] = {};
      } else if (!after_writer) {
        remember(cell, cell.writer);
      }
      cell.writer = mine;
    }
  }
}

void next_phase() {
  ++phase;
  std::fill_n(now.begin(), block.threads, 1);
}

void begin_launch() {
  launch_phase = phase + 1;
  blocks.clear();
  now.resize(kMostThreads);
  known.resize(kMostThreads);
}

void begin_order() {  // of a block
  next_phase();
  block_phase = phase;
  blocks.emplace_back(phase, block.index);
  released.clear();
}

void join_block() { next_phase(); }

void join(const unsigned* threads, int count) {
  static Clock all;
  all.assign(block.threads, 0);
  for (int i = 0; i < count; ++i) {
    merge(all, times(known[threads[i]]));
    all[threads[i]] = std::max(all[threads[i]], now[threads[i]]);
  }
  for (int i = 0; i < count; ++i) {
    known[threads[i]].times = all;
    ++now[threads[i]];
  }
}

void release(const void* object) {
  Clock& theirs = times(released[object]);
  merge(theirs, times(known[self->id]));
  theirs[self->id] = std::max(theirs[self->id], now[self->id]);
  ++now[self->id];
}

void acquire(const void* object) { merge(times(known[self->id]), times(released[object])); }

}  // namespace emulator::checker
