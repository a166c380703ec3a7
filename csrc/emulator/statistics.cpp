// Accesses by source line. The lanes of a warp that come by one instruction for the n-th time make one request, as on
// the hardware. A request to global memory is served in sectors of 32 bytes; one to shared memory in wavefronts, each
// of which takes one 4-byte word from every one of 32 banks. Accesses of 8 and 16 bytes are served for half and quarter
// warps at a time, so that ldmatrix (16 bytes a row) takes a wavefront for 8 rows if no banks collide.
#include <algorithm>
#include <map>
#include <set>
#include <string_view>

#include "checker.h"

namespace emulator {
namespace checker {

bool counting = false;

namespace {

struct Lane {
  uintptr_t address = 0;
  size_t bytes = 0;
};
struct Request {
  Lane lanes[kWarp];
};
struct Sums {
  long requests = 0, units = 0, ideal = 0, width = 0;
};
struct Instruction {
  Place place;
  const char* kind;
  bool shared;
  std::vector<uint32_t> met;                  // how often each thread of the block came by
  std::vector<std::vector<Request>> by_warp;  // in this block
  Sums sums;
};
std::map<std::pair<Place, std::string_view>, Instruction> instructions;
std::map<std::pair<Place, std::string_view>, Sums> counts;  // of what is no access

Sums in_sectors(const Request& request) {
  std::set<uintptr_t> sectors, bytes;
  for (const Lane& lane : request.lanes) {
    for (size_t i = 0; i < lane.bytes; ++i) {
      sectors.insert((lane.address + i) / 32);
      bytes.insert(lane.address + i);
    }
  }
  return {1, static_cast<long>(sectors.size()), static_cast<long>((bytes.size() + 31) / 32)};
}

Sums in_wavefronts(const Request& request) {
  size_t widest = 4;
  for (const Lane& lane : request.lanes) widest = std::max(widest, std::min<size_t>(lane.bytes, 16));
  const int together = static_cast<int>(kWarp * 4 / widest);
  Sums sums{1, 0, 0};
  for (int first = 0; first < kWarp; first += together) {
    std::set<uintptr_t> words;
    for (int lane = first; lane < first + together; ++lane) {
      const auto& [address, bytes] = request.lanes[lane];
      for (size_t i = 0; i < bytes; ++i) words.insert((address + i) / 4);
    }
    if (words.empty()) continue;
    int in_bank[32] = {};
    for (const uintptr_t word : words) ++in_bank[word % 32];
    sums.units += *std::max_element(in_bank, in_bank + 32);
    ++sums.ideal;
  }
  return sums;
}

}  // namespace

void count_access(const Region& region, uintptr_t address, size_t bytes, Access access, Place place, const char* what) {
  const char* kind = what                       ? what
                     : access == Access::atomic ? (region.shared ? "shared atomic" : "global atomic")
                     : region.shared            ? (access == Access::read ? "shared load" : "shared store")
                                                : (access == Access::read ? "global load" : "global store");
  auto [found, is_new] = instructions.try_emplace({place, kind});
  Instruction& at = found->second;
  if (is_new) {
    at.place = place;
    at.kind = kind;
    at.shared = region.shared;
  }
  if (at.met.empty()) {
    at.met.assign(block.threads, 0);
    at.by_warp.resize((block.threads + kWarp - 1) / kWarp);
  }
  auto& requests = at.by_warp[self->warp];
  const size_t nth = at.met[self->id]++;
  if (requests.size() <= nth) requests.resize(nth + 1);
  requests[nth].lanes[self->lane] = {address, bytes};
  at.sums.width = std::max(at.sums.width, static_cast<long>(bytes));
}

void finish_block() {
  for (auto& [key, at] : instructions) {
    for (const auto& requests : at.by_warp) {
      for (const Request& request : requests) {
        const Sums more = at.shared ? in_wavefronts(request) : in_sectors(request);
        at.sums.requests += more.requests;
        at.sums.units += more.units;
        at.sums.ideal += more.ideal;
      }
    }
    at.by_warp.clear();
    at.met.clear();
  }
}

}  // namespace checker

void count(const char* kind, Site site) {
  if (checker::counting && kind) ++checker::counts[{checker::place_of(site), kind}].requests;
}

void set_counting(bool on) {
  checker::counting = on;
  if (on) {
    checker::instructions.clear();
    checker::counts.clear();
  }
}

std::vector<Row> statistics() {
  using namespace checker;
  std::vector<Place> places;
  for (const auto& [key, at] : instructions) places.push_back(key.first);
  for (const auto& [key, sums] : counts) places.push_back(key.first);
  resolve_all(places);
  std::map<std::tuple<std::string, int, std::string>, Sums> rows;
  const auto add = [&](Place place, std::string_view kind, const Sums& sums) {
    const Line& line = resolve(place);
    Sums& row = rows[{line.file, line.line, std::string(kind)}];
    row.requests += sums.requests;
    row.units += sums.units;
    row.ideal += sums.ideal;
    row.width = std::max(row.width, sums.width);
  };
  for (const auto& [key, at] : instructions) add(key.first, key.second, at.sums);
  for (const auto& [key, sums] : counts) add(key.first, key.second, sums);
  std::vector<Row> result;
  for (const auto& [key, sums] : rows) {
    result.push_back(
        {std::get<0>(key), std::get<1>(key), std::get<2>(key), sums.requests, sums.units, sums.ideal, sums.width});
  }
  return result;
}

}  // namespace emulator
