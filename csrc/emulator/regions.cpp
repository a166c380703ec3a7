// Tensors and shared arrays: which bytes a kernel may touch, and which of them are defined, writable or in flight.
#include <algorithm>

#include "checker.h"

namespace emulator {
namespace checker {

namespace {

std::vector<Region> tensors;  // of this call, by address; they do not overlap
std::vector<Region> arrays;   // slots for shared arrays; the running block uses the first `live`
size_t live = 0;
int named = 0;  // tensors, in the order in which the binding named them
Region* last = nullptr;

constexpr size_t kArenaBytes = 2 * kSharedBytes;
constexpr size_t kFar = 1 << 20;  // what is further away has nothing to do with a tensor

}  // namespace

Chunk& Region::chunk(uintptr_t address) {
  const uintptr_t origin = begin & ~uintptr_t{15};
  const size_t index = (address - origin) / kChunkBytes;
  if (chunks.empty()) chunks.resize((begin + bytes - origin) / kChunkBytes + 1);
  std::unique_ptr<Chunk>& found = chunks[index];
  if (!found) {
    const uintptr_t from = origin + index * kChunkBytes;
    found = std::make_unique<Chunk>();
    found->begin = from;
    found->flags.assign(std::min<size_t>(kChunkBytes, begin + bytes - from), 0);
    for (const Right& right : rights) {
      const uintptr_t end = std::min(right.end, from + found->flags.size());
      for (uintptr_t at = std::max(right.begin, from); at < end; ++at) found->flags[at - from] |= right.flags;
    }
  }
  return *found;
}

void set_flags(uintptr_t address, size_t bytes, unsigned char flag, bool on) {
  find(address)->each_part(address, bytes, [&](Chunk& chunk, uintptr_t at, size_t part) {
    for (size_t i = 0; i < part; ++i) {
      unsigned char& all = chunk.flags[at - chunk.begin + i];
      all = on ? all | flag : all & ~flag;
    }
  });
}

Region* find(uintptr_t address) {
  if (last && last->holds(address)) return last;
  last = nullptr;
  if (address - reinterpret_cast<uintptr_t>(arena) < kArenaBytes) {
    for (size_t i = 0; i < live; ++i) {
      if (arrays[i].holds(address)) last = &arrays[i];
    }
  } else {
    auto after = std::upper_bound(tensors.begin(), tensors.end(), address,
                                  [](uintptr_t a, const Region& region) { return a < region.begin; });
    if (after != tensors.begin() && (after - 1)->holds(address)) last = &*(after - 1);
  }
  return last;
}

std::string title(const Region& region) { return region.name + " (" + std::to_string(region.bytes) + " bytes)"; }

std::string nearest(uintptr_t address, size_t bytes) {
  if (address < 4096) return "at a null pointer";
  const bool shared = address - reinterpret_cast<uintptr_t>(arena) < kArenaBytes;
  const Region* best = nullptr;
  size_t distance = ~size_t{0};
  const auto look = [&](const Region& region) {
    const uintptr_t end = region.begin + region.bytes;
    const size_t away = address >= end ? address - end : address < region.begin ? region.begin - address : 0;
    if (away < distance) {
      distance = away;
      best = &region;
    }
  };
  if (shared) {
    for (size_t i = 0; i < live; ++i) look(arrays[i]);
  } else {
    for (const Region& region : tensors) look(region);
  }
  if (!best || distance > kFar)
    return shared ? "of shared memory that the launch did not ask for" : "outside of every tensor of the call";
  const uintptr_t end = best->begin + best->bytes;
  if (address == end) return "right past the end of " + title(*best);
  if (address > end) return std::to_string(address - end) + " bytes past the end of " + title(*best);
  if (address < best->begin) return std::to_string(best->begin - address) + " bytes before " + title(*best);
  return std::to_string(address + bytes - end) + " bytes over the end of " + title(*best);
}

void new_shared(const void* data, size_t bytes, const char* name) {
  if (live == arrays.size()) arrays.emplace_back();
  Region& region = arrays[live++];
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (region.begin != begin || region.bytes != bytes) {
    region = Region{};
    region.begin = begin;
    region.bytes = bytes;
    region.rights = {{begin, begin + bytes, kWritable}};
  }  // else its stamps stay: they are of earlier blocks, and so mean nothing
  region.name = name == std::string("dynamic shared memory") ? name : "shared array '" + std::string(name) + "'";
  region.shared = true;
  for (auto& chunk : region.chunks) {
    if (chunk) chunk->flags.assign(chunk->flags.size(), kWritable);
  }
  last = nullptr;
}

void begin_regions() {
  live = 0;
  last = nullptr;
}

void in_flight(const void* shared, int bytes, bool begins, Site site) {
  const auto address = reinterpret_cast<uintptr_t>(shared);
  Region* region = find(address);
  if (!region) return;  // touch() has said so
  set_flags(address, static_cast<size_t>(bytes), kInFlight, begins);
  // What was copied counts as written when it was waited for: whoever reads it must come after that.
  if (!begins) order(*region, address, bytes, Access::write, place_of(site));
}

void end_call() {
  tensors.clear();
  named = 0;
  last = nullptr;
}

}  // namespace checker

void allow(const void* data, int64_t bytes, Use use) {
  using namespace checker;
  ++named;
  if (bytes <= 0) return;
  const char* what = use == Use::read ? "an input" : use == Use::write ? "an output" : "changed in place";
  Region region;
  region.begin = reinterpret_cast<uintptr_t>(data);
  region.bytes = static_cast<size_t>(bytes);
  region.name = "tensor " + std::to_string(named) + " of the call, " + what;
  const unsigned char flags = use == Use::read ? kDefined : use == Use::write ? kWritable : kDefined | kWritable;
  region.rights = {{region.begin, region.begin + region.bytes, flags}};
  // A tensor that overlaps one of before (the same as input and output, a view) becomes one region with it.
  for (size_t i = 0; i < tensors.size();) {
    Region& other = tensors[i];
    if (other.begin >= region.begin + region.bytes || region.begin >= other.begin + other.bytes) {
      ++i;
      continue;
    }
    Region both;
    both.begin = std::min(region.begin, other.begin);
    both.bytes = std::max(region.begin + region.bytes, other.begin + other.bytes) - both.begin;
    both.name = region.name;
    both.rights = region.rights;
    both.rights.insert(both.rights.end(), other.rights.begin(), other.rights.end());
    for (const Region* part : {&region, &other}) {  // what earlier launches of the call have written is defined
      for (const auto& chunk : part->chunks) {
        for (size_t k = 0; chunk && k < chunk->flags.size(); ++k) {
          if (!chunk->flags[k]) continue;  // in front of the region
          both.chunk(chunk->begin + k).flags[chunk->begin + k - both.chunk(chunk->begin + k).begin] |= chunk->flags[k];
        }
      }
    }
    region = std::move(both);
    tensors.erase(tensors.begin() + static_cast<std::ptrdiff_t>(i));
  }
  tensors.insert(std::upper_bound(tensors.begin(), tensors.end(), region.begin,
                                  [](uintptr_t a, const Region& other) { return a < other.begin; }),
                 std::move(region));
  last = nullptr;
}

}  // namespace emulator
