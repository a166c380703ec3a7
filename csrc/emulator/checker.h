// What the files of the checked build share: checker.cpp (the compiler's hooks), regions.cpp (what may be touched),
// races.cpp (who comes after whom), statistics.cpp (accesses by source line), lines.cpp (addresses as file:line).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "state.h"

namespace emulator::checker {

// --- lines.cpp

// A place in the source: an offset into this library's code, or, with kSite, the number of a Site.
using Place = uint32_t;
constexpr Place kSite = 1u << 30, kAtomic = 1u << 31;  // kAtomic: in a Stamp, the access was an atomic
struct Line {
  std::string file;  // the innermost frame outside of the headers that all kernels use, where there is one
  int line = 0;
  std::string text;  // for messages: "rms_norm.cu:31", or "vector.cuh:27 from rms_norm.cu:31"
};
Place place_of(const void* return_address);
Place place_of(Site site);
const Line& resolve(Place place);
void resolve_all(const std::vector<Place>& places);  // the same for many at once: addr2line is started once
bool in_module_data(uintptr_t address, size_t bytes);

// --- races.cpp

// One access: in which phase (the time between two block barriers; numbered through all blocks of all launches), by
// which actor (thread or asynchronous unit), at which of its own times within the phase.
struct Stamp {
  uint32_t phase = 0, who = 0;  // phase 0: none; who: time << 11 | actor
  Place place = 0;
};
struct Cell {
  Stamp writer;
  Stamp readers[3];  // the last, the last of another thread of its warp, the last of another warp
};

// --- regions.cpp

enum Flag : unsigned char { kDefined = 1, kWritable = 2, kInFlight = 4, kMbarrier = 8 };

// Up to kChunkBytes of a region, made when somebody comes by: of a tensor that spans gigabytes (a view with large
// strides) only what is touched takes memory.
constexpr size_t kChunkBytes = 1 << 16;
struct Chunk {
  uintptr_t begin;                   // a multiple of 16
  std::vector<unsigned char> flags;  // Flag of each byte
  // Stamps: one cell for 1 << shift bytes. It starts coarse and is refined when a smaller access comes by, which is
  // exact, since all before covered whole cells.
  std::vector<Cell> cells;
  unsigned shift = 4;
};

// A tensor or a shared array.
struct Region {
  struct Right {  // what may be done with [begin, end): a Flag
    uintptr_t begin, end;
    unsigned char flags;
  };
  uintptr_t begin = 0;
  size_t bytes = 0;
  std::string name;
  bool shared = false;
  std::vector<Right> rights;
  std::vector<std::unique_ptr<Chunk>> chunks;

  bool holds(uintptr_t address) const { return address - begin < bytes; }
  Chunk& chunk(uintptr_t address);
  // Calls f(chunk, address, bytes) for the parts of a range in each chunk.
  template <class F>
  void each_part(uintptr_t address, size_t size, F&& f) {
    while (size) {
      Chunk& here = chunk(address);
      const size_t rest = here.begin + kChunkBytes - address, part = size < rest ? size : rest;
      f(here, address, part);
      address += part;
      size -= part;
    }
  }
};
void begin_regions();                                  // of a block
void end_call();                                       // ends the permissions
Region* find(uintptr_t address);                       // null if there is none
std::string nearest(uintptr_t address, size_t bytes);  // "4 bytes past the end of …"
void set_flags(uintptr_t address, size_t bytes, unsigned char flag, bool on);
std::string title(const Region& region);  // "shared array 'sums' (128 bytes)"

void begin_order();  // of a block
// Ends the launch unless nothing unordered conflicts with this access, and stamps it.
void order(Region& region, uintptr_t address, size_t bytes, Access access, Place place);
bool written_by_launch(Region& region, uintptr_t address, size_t bytes);

// --- statistics.cpp

extern bool counting;
void count_access(const Region& region, uintptr_t address, size_t bytes, Access access, Place place, const char* what);
void finish_block();  // the groups of lanes of this block are complete

[[noreturn]] void stop(Place place, const std::string& what);  // a fault at this place

}  // namespace emulator::checker
