// Which access comes after which (happens-before, as in FastTrack, Flanagan & Freund, PLDI 2009). A block barrier
// orders all threads of the block: it begins a new phase, and what an earlier phase did is ordered. Within a phase
// every thread has its own time and knows the times of others that it heard of through warp barriers, named barriers
// and mbarriers. Shuffles, votes and atomics order nothing. Blocks of one launch are never ordered, launches always.
//
// Asynchronous units are actors like threads, with numbers after the threads': all copies that one mbarrier counts, and
// all products of one warpgroup. A unit knows what the threads knew that gave it its work; what it did is known to
// those who have waited for it, and no barrier of threads tells of it.
//
// An mbarrier passes on what arrived in a phase when the phase is complete, not before.
//
// Threads and asynchronous units see shared memory through different proxies: what a thread wrote must have passed a
// fence.proxy.async, in between, before a unit may touch it. `fenced` says which times of others have.
#include <algorithm>
#include <unordered_map>

#include "checker.h"

namespace emulator::checker {

namespace {

uint32_t phase = 0, block_phase = 0, launch_phase = 0;  // the current one, the first of the block, of the launch
std::vector<std::pair<uint32_t, uint3>> blocks;         // of the launch: their first phases

using Clock = std::vector<uint32_t>;  // by actor: how much of it is known to have happened; 0 past the end
struct Known {
  uint32_t phase = 0;  // in which `times` and `fenced` say anything
  Clock times, fenced;
  uint32_t covered = 0;  // what earlier phases than this one wrote is fenced
};
struct Arrivals {  // at an mbarrier: in the phase under way, in those that are complete
  Known open, complete;
};

constexpr uint32_t kActorBits = 11;
constexpr uint32_t kMostActors = 1 << kActorBits;
static_assert(kMostThreads < kMostActors);

uint32_t now[kMostActors];                           // each actor's own time in this phase, from 1
std::vector<Known> known;                            // by actor
std::unordered_map<const void*, Arrivals> arrivals;  // by mbarrier
std::unordered_map<const void*, uint32_t> units;     // their numbers as actors
std::unordered_map<uint32_t, Clock> fenced_in;       // an earlier phase of this block: what was fenced at its end
bool fences = false;                                 // was there one in this phase?
int64_t acting = -1;                                 // an asynchronous unit, or nobody: then it is the running thread

uint32_t actor() { return acting < 0 ? self->id : static_cast<uint32_t>(acting); }
uint32_t at(const Clock& clock, uint32_t who) { return who < clock.size() ? clock[who] : 0; }

void raise(Clock& clock, uint32_t who, uint32_t time) {
  if (clock.size() <= who) clock.resize(who + 1);
  clock[who] = std::max(clock[who], time);
}

Known& current(Known& k) {
  if (k.phase != phase) {
    k.phase = phase;
    k.times.clear();
    k.fenced.clear();
  }
  return k;
}

void merge(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}
void merge(Known& into, const Known& from) {  // both of this phase
  merge(into.times, from.times);
  merge(into.fenced, from.fenced);
  into.covered = std::max(into.covered, from.covered);
}
void meet(Clock& into, const Clock& from) {
  into.resize(std::min(into.size(), from.size()));
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::min(into[i], from[i]);
}

uint32_t actor_of(const Stamp& s) { return s.who & (kMostActors - 1); }
uint32_t time_of(const Stamp& s) { return s.who >> kActorBits; }
uint32_t warp_of(const Stamp& s) { return actor_of(s) / kWarp; }
bool other_block(const Stamp& s) { return s.phase < block_phase; }

uint32_t unit_of(const void* unit) {
  const auto [found, is_new] = units.try_emplace(unit, static_cast<uint32_t>(block.threads + units.size()));
  if (is_new && found->second >= kMostActors) fault("too many mbarriers for the checker", self->site);
  if (is_new) now[found->second] = 1;
  if (known.size() <= found->second) known.resize(found->second + 1);
  return found->second;
}

// Does what the actor does now come after `s`?
bool before(const Stamp& s, bool shared) {
  if (s.phase < launch_phase) return true;
  if (s.phase < block_phase) return shared;  // another block, whose shared memory is not this one
  if (s.phase < phase || actor_of(s) == actor()) return true;
  const Known& mine = known[actor()];
  return mine.phase == phase && at(mine.times, actor_of(s)) >= time_of(s);
}

// Has what `s` wrote passed a fence between the proxies, for the unit that acts?
bool is_fenced(const Stamp& s) {
  if (s.phase < block_phase || actor_of(s) >= block.threads) return true;
  const Known& mine = known[actor()];
  if (s.phase < mine.covered) return true;
  if (s.phase == phase) return mine.phase == phase && at(mine.fenced, actor_of(s)) >= time_of(s);
  const auto found = fenced_in.find(s.phase);
  return found != fenced_in.end() && at(found->second, actor_of(s)) >= time_of(s);
}

void remember(Cell& cell, const Stamp& s) {
  Stamp* r = cell.readers;
  const bool same_block = r[0].phase && !other_block(r[0]);
  if (same_block && actor_of(r[0]) == actor_of(s)) {
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
  const unsigned id = actor_of(s);
  const dim3& size = block.size;
  if (id >= block.threads) return "an asynchronous copy or wgmma that was not waited for";
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

void refine(Chunk& chunk, unsigned shift) {
  const size_t count = (chunk.flags.size() >> shift) + 1;
  std::vector<Cell> finer(count);
  for (size_t i = 0; i < count && !chunk.cells.empty(); ++i) finer[i] = chunk.cells[i >> (chunk.shift - shift)];
  chunk.cells = std::move(finer);
  chunk.shift = shift;
}

void order_part(const Region& region, Chunk& chunk, uintptr_t address, size_t bytes, Access access, Place place) {
  unsigned shift = chunk.shift;
  while ((address | bytes) & ((size_t{1} << shift) - 1)) --shift;
  if (shift < chunk.shift || chunk.cells.empty()) refine(chunk, shift);
  const bool atomic = access == Access::atomic, shared = region.shared;
  const Stamp mine{phase, now[actor()] << kActorBits | actor(), place | (atomic ? kAtomic : 0)};
  const size_t step = size_t{1} << chunk.shift;
  for (uintptr_t at = address; at < address + bytes; at += step) {
    Cell& cell = chunk.cells[(at - chunk.begin) >> chunk.shift];
    const bool after_writer = before(cell.writer, shared);
    if (!after_writer && !(atomic && cell.writer.place & kAtomic)) race(region, at, access, place, cell.writer, true);
    if (acting >= 0 && shared && !is_fenced(cell.writer)) {
      stop(place, std::string(access == Access::read ? "reads" : "writes") + " byte " +
                      std::to_string(at - region.begin) + " of " + title(region) + " asynchronously, which " +
                      who(cell.writer) + " wrote at " + resolve(cell.writer.place).text +
                      " with no fence.proxy.async in between");
    }
    for (const Stamp& reader : cell.readers) {  // an atomic may stand among the readers, and conflicts with reads too
      const bool theirs = reader.place & kAtomic, conflict = access == Access::read ? theirs : !(atomic && theirs);
      if (conflict && !before(reader, shared)) race(region, at, access, place, reader, false);
    }
    if (access == Access::read) {
      remember(cell, mine);
    } else {
      if (!atomic) {
        cell.readers[0] = cell.readers[1] = cell.readers[2] = {};
      } else if (!after_writer || (cell.writer.phase && !(cell.writer.place & kAtomic))) {
        remember(cell, cell.writer);  // a plain write, too, which other threads' atomics must come after
      }
      cell.writer = mine;
    }
  }
}

}  // namespace

void order(Region& region, uintptr_t address, size_t bytes, Access access, Place place) {
  region.each_part(address, bytes, [&](Chunk& chunk, uintptr_t at, size_t part) {
    order_part(region, chunk, at, part, access, place);
  });
}

bool written_by_launch(Region& region, uintptr_t address, size_t bytes) {
  bool found = false;
  region.each_part(address, bytes, [&](Chunk& chunk, uintptr_t at, size_t part) {
    for (uintptr_t i = at; i < at + part; ++i) {
      found = found || chunk.cells[(i - chunk.begin) >> chunk.shift].writer.phase >= launch_phase;
    }
  });
  return found;
}

void next_phase() {
  ++phase;
  std::fill_n(now, block.threads + units.size(), 1);
}

void begin_launch() {
  launch_phase = phase + 1;
  blocks.clear();
  known.resize(kMostThreads);
}

void begin_order() {  // of a block
  units.clear();
  arrivals.clear();
  fenced_in.clear();
  fences = false;
  acting = -1;
  next_phase();
  block_phase = phase;
  blocks.emplace_back(phase, block.index);
}

void join_block() {
  if (fences) {
    Clock all;
    uint32_t covered = 0;
    for (unsigned i = 0; i < block.threads; ++i) {
      merge(all, current(known[i]).fenced);
      covered = std::max(covered, known[i].covered);
    }
    for (unsigned i = 0; i < block.threads; ++i) known[i].covered = covered;
    fenced_in[phase] = std::move(all);
    fences = false;
  }
  next_phase();
}

void join(const unsigned* threads, int count) {
  static Known all;
  all.phase = 0;
  all.covered = 0;
  current(all);
  for (int i = 0; i < count; ++i) {
    merge(all, current(known[threads[i]]));
    raise(all.times, threads[i], now[threads[i]]);
  }
  for (int i = 0; i < count; ++i) {
    known[threads[i]] = all;
    ++now[threads[i]];
  }
}

void arrive(const void* mbarrier) {
  Known& open = current(arrivals[mbarrier].open);
  merge(open, current(known[self->id]));
  raise(open.times, self->id, now[self->id]++);
}

void complete(const void* mbarrier) {
  Arrivals& a = arrivals[mbarrier];
  merge(current(a.complete), current(a.open));
}

void acquire(const void* mbarrier) { merge(current(known[self->id]), current(arrivals[mbarrier].complete)); }

void proxy_fence() {
  Known& mine = current(known[self->id]);
  merge(mine.fenced, mine.times);
  raise(mine.fenced, self->id, now[self->id]++);
  mine.covered = phase;
  fences = true;
}

// --- asynchronous units

void act_as(const void* unit, unsigned first, unsigned count) {
  const uint32_t me = unit_of(unit);
  Known least = current(known[first]);
  raise(least.times, first, now[first]);
  for (unsigned i = first + 1; i < first + count; ++i) {
    Known one = current(known[i]);
    raise(one.times, i, now[i]);
    meet(least.times, one.times);
    meet(least.fenced, one.fenced);
    least.covered = std::min(least.covered, one.covered);
  }
  known[me] = std::move(least);
  acting = me;
}

void act_again(const void* unit) { acting = unit_of(unit); }

void act_no_more() { acting = -1; }

uint32_t next_time(const void* unit) { return now[unit_of(unit)]++; }

void land(const void* unit, const void* mbarrier) {
  const uint32_t who = unit_of(unit);
  raise(current(arrivals[mbarrier].open).times, who, now[who]++);
}

void learn(const void* unit, uint32_t time, unsigned first, unsigned count) {
  const uint32_t who = unit_of(unit);
  for (unsigned i = first; i < first + count; ++i) raise(current(known[i]).times, who, time);
}

}  // namespace emulator::checker
