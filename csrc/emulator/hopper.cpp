// mbarriers and TMA copies; the rules are in hopper.h.
#include "hopper.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <deque>
#include <unordered_map>

#include "asynchronous.h"

namespace emulator {
namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1, kMostArrivals = (1 << 20) - 1;  // that an mbarrier counts

struct Mbarrier {
  unsigned count, pending;  // arrivals that a phase needs, and still needs
  int64_t bytes = 0;        // expected and not yet landed
  unsigned phase = 0;
  bool fenced = false;
  unsigned maker = 0;
};
std::unordered_map<const uint64_t*, Mbarrier> barriers;

struct Transfer {
  Span to;
  const char* from;  // of a bulk copy
  TensorMap map;     // of a tensor's
  int at[4];
  bool tensor;
  uint64_t* bar;
  Fiber* by;
  Site site;
};
std::deque<Transfer> transfers;  // under way

bool landing = false;  // the next thread to run lets a copy land

Mbarrier& find(uint64_t* bar, Site site) {
  auto found = barriers.find(bar);
  if (found == barriers.end()) fault("an mbarrier that nobody has initialized", site);
  return found->second;
}

void advance(uint64_t* bar, Mbarrier& b) {
  if (b.pending || b.bytes) return;
  checker::complete(bar);
  ++b.phase;
  b.pending = b.count;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::at_mbarrier && fiber.part == bar) fiber.state = State::ready;
  }
}

// Calls f(row, from, first, last) for each row of the box at `at`: its elements [first, last) are those of the tensor
// from `from` on, the others are outside of it.
template <class F>
void for_each_row(const TensorMap& map, const int (&place)[4], F&& f) {
  int row = 0;
  for (int w = 0; w < map.box[3]; ++w) {
    for (int z = 0; z < map.box[2]; ++z) {
      for (int y = 0; y < map.box[1]; ++y, ++row) {
        const int64_t at[4] = {place[0], place[1] + y, place[2] + z, place[3] + w};
        bool inside = true;
        for (int i = 1; i < 4; ++i) inside = inside && at[i] >= 0 && at[i] < map.size[i];
        const char* from = map.data + 2 * at[0] + at[1] * map.stride[1] + at[2] * map.stride[2] + at[3] * map.stride[3];
        const auto first = static_cast<int>(std::clamp<int64_t>(-at[0], 0, map.box[0]));
        const auto last = static_cast<int>(std::clamp<int64_t>(map.size[0] - at[0], 0, map.box[0]));
        f(row, from, first, inside ? last : first);
      }
    }
  }
}

// The hardware reads tensor maps from the kernel's parameters (or constant or global memory), never from a variable.
// Here parameters are variables too, so the same map must be among the launch's arguments.
bool is_argument(const TensorMap& map) {
  const auto* begin = static_cast<const char*>(block.context);
  constexpr size_t bytes = offsetof(TensorMap, box) + sizeof map.box;
  for (size_t i = 0; i + bytes <= block.context_bytes; i += 8) {
    if (!std::memcmp(begin + i, &map, bytes)) return true;
  }
  return false;
}

void write(const Transfer& t) {
  auto* to = const_cast<char*>(t.to.begin);
  if (!t.tensor) {
    std::memcpy(to, t.from, t.to.end - t.to.begin);
    return;
  }
  for_each_row(t.map, t.at, [&](int row, const char* from, int first, int last) {
    for (int x = 0; x < t.map.box[0]; ++x) {
      const uint16_t bits = x >= first && x < last ? bits_at(from + 2 * x) : uint16_t{0};
      std::memcpy(to + row * 128 + ((x / 8) ^ (row % 8)) * 16 + x % 8 * 2, &bits, 2);
    }
  });
}

void land(const Transfer& t) {
  checker::pause(true);
  write(t);
  checker::pause(false);
  checker::act_again(t.bar);
  checker::in_flight(t.to.begin, static_cast<int>(t.to.end - t.to.begin), false, t.site);
  checker::land(t.bar, t.bar);
  checker::act_no_more();
  Mbarrier& b = barriers.at(t.bar);
  b.bytes -= t.to.end - t.to.begin;
  advance(t.bar, b);
}

void start(Transfer&& t) {
  if (!find(t.bar, t.site).fenced) {
    fault("a copy signals an mbarrier whose initialization no fence has made visible to it", t.site);
  }
  require_shared(t.to.begin, t.tensor ? 1024 : 16, "a copy's destination", t.site);
  for (const Transfer& other : transfers) {
    if (other.to.meets(t.to)) fault("a copy into shared memory that a copy under way writes", t.site);
  }
  if (products_read(t.to)) fault("a copy into shared memory that a wgmma under way reads", t.site);
  const int bytes = static_cast<int>(t.to.end - t.to.begin);
  checker::act_as(t.bar, self->id, 1);
  for (int row = 0; row < bytes; row += 128) {
    touch(t.to.begin + row, std::min(128, bytes - row), Access::write, t.site, "TMA to shared");
  }
  checker::act_no_more();
  checker::in_flight(t.to.begin, bytes, true, t.site);
  if (options().eager) {
    land(t);
  } else {
    transfers.push_back(t);
  }
}

}  // namespace

void mbarrier_init(uint64_t* bar, unsigned count, Site site) {
  require_shared(bar, 8, "an mbarrier", site);
  if (count < 1 || count > kMostArrivals) fault("an mbarrier of no arrivals, or of more than 2^20 - 1", site);
  if (barriers.count(bar)) fault("an mbarrier is initialized again while it lives", site);
  checker::mbarrier_memory(bar, true, site);
  barriers[bar] = {count, count};
  barriers[bar].maker = self->id;
}

void mbarrier_init_fence() {
  for (auto& [bar, b] : barriers) b.fenced = b.fenced || b.maker == self->id;
}

void mbarrier_arrive(uint64_t* bar, unsigned expected_bytes, Site site) {
  Mbarrier& b = find(bar, site);
  if (!b.pending) fault("more arrivals at an mbarrier than its phase takes", site);
  checker::mbarrier_memory(bar, false, site);
  checker::arrive(bar);
  b.bytes += expected_bytes;
  if (b.bytes > kMostBytes) fault("an mbarrier expects more than 2^20 - 1 bytes", site);
  --b.pending;
  advance(bar, b);
}

void mbarrier_wait(uint64_t* bar, unsigned parity, Site site) {
  find(bar, site);
  checker::mbarrier_memory(bar, false, site);
  while ((find(bar, site).phase & 1) == parity) {
    self->part = bar;
    yield(State::at_mbarrier, site);
    if (landing) {
      landing = false;
      const bool last = options().order % 2;  // copies land in any order
      const Transfer t = last ? transfers.back() : transfers.front();
      last ? transfers.pop_back() : transfers.pop_front();
      land(t);
    }
  }
  checker::acquire(bar);
}

void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* bar, Site site) {
  require_global(global, 16, "a bulk copy's source", site);
  if (bytes % 16 || !bytes) fault("a bulk copy of no multiple of 16 bytes", site);
  touch(global, static_cast<int>(bytes), Access::read, site, "TMA from global");
  auto* to = static_cast<char*>(shared);
  start({{to, to + bytes}, static_cast<const char*>(global), {}, {}, false, bar, self, site});
}

void tensor_copy(void* shared, const TensorMap& map, const int (&at)[4], uint64_t* bar, Site site) {
  if (map.box[0] != 64) fault("a tensor map whose rows are not 128 bytes", site);
  if (!is_argument(map)) fault("a tensor map that is no argument of the kernel", site);
  auto* to = static_cast<char*>(shared);
  for_each_row(map, at, [&](int, const char* from, int first, int last) {
    if (first < last) touch(from + 2 * first, 2 * (last - first), Access::read, site, "TMA from global");
  });
  start({{to, to + 128 * map.box[1] * map.box[2] * map.box[3]},
         nullptr,
         map,
         {at[0], at[1], at[2], at[3]},
         true,
         bar,
         self,
         site});
}

void async_proxy_fence(Site site) {
  count("fence.proxy.async", site);
  checker::proxy_fence();
}

void begin_asynchronous() {
  barriers.clear();
  transfers.clear();
  landing = false;
  begin_products();
}

bool land_one() {
  if (finish_products()) return true;
  if (transfers.empty()) return false;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state != State::at_mbarrier) continue;
    fiber.state = State::ready;
    return landing = true;
  }
  return false;
}

const char* unfinished() {
  if (!transfers.empty()) return "the block ends while a copy is under way";
  return products_under_way() ? "the block ends while a wgmma is under way" : "";
}

bool copies_write(const Span& bytes) {
  return std::any_of(transfers.begin(), transfers.end(), [&](const Transfer& t) { return t.to.meets(bytes); });
}

}  // namespace emulator
