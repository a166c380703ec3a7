// mbarriers, TMA copies and wgmma; the rules are in hopper.h.
#include "hopper.h"

#include <cstring>
#include <deque>
#include <limits>
#include <unordered_map>

#include "state.h"

namespace emulator {
namespace {

struct Mbarrier {
  unsigned count, pending;  // arrivals that a phase needs, and still needs
  int64_t bytes = 0;        // expected and not yet landed
  unsigned phase = 0;
  bool fenced = false;
  unsigned maker = 0;
};
std::unordered_map<const uint64_t*, Mbarrier> barriers;

struct Span {
  const char *begin, *end;
  bool meets(const Span& other) const { return begin < other.end && other.begin < end; }
};

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

constexpr int kGroup = 128, kGroups = kMostThreads / kGroup;
struct Operation {
  Product parts[kGroup];
  unsigned a[kGroup][4];
  std::vector<float> before[kGroup];  // the accumulators, where this operation is the first under way on them
  Site site;
};
struct Warpgroup {
  void* arrived[kGroup];
  int count = 0;
  Site first;
  std::vector<Operation> open;
  std::deque<std::vector<Operation>> groups;
  bool waiting = false;  // all its threads, for the groups but the last `left`
  int left = 0;
};
Warpgroup warpgroups[kGroups];
bool fenced[kMostThreads];
bool landing = false;  // the next thread to run lets a copy land

Mbarrier& find(uint64_t* bar, Site site) {
  auto found = barriers.find(bar);
  if (found == barriers.end()) fault("an mbarrier that nobody has initialised", site);
  return found->second;
}

void advance(uint64_t* bar, Mbarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.count;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::at_mbarrier && fiber.part == bar) fiber.state = State::ready;
  }
}

// --- where the elements of a matrix in shared memory are: "Matrix descriptor" and "Canonical layouts" of the PTX
// manual, 128-byte swizzle, elements of 2 bytes. K-major (`transposed` false): rows of 64 elements along k; a group of
// 8 rows takes 1024 bytes, the next is `stride` further. MN-major: rows of 64 elements along n, 8 values of k a group,
// the next group `stride` further, the next 64 of n `leading`.
const char* element(uint64_t matrix, bool transposed, int mn, int k) {
  const auto field = [&](int bit) { return static_cast<unsigned>(matrix >> bit & 0x3fff) * 16; };
  const unsigned leading = field(16), stride = field(32);
  unsigned address = field(0);
  address += transposed ? mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                        : mn / 8 * stride + mn % 8 * 128 + k * 2;
  const unsigned mixed = matrix >> 62 == 1 ? address ^ (address >> 7 & 7) << 4 : address;  // 1: the 128-byte swizzle
  return reinterpret_cast<const char*>(arena) + mixed;
}

uint16_t bits_at(const char* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return bits;
}

Span span(uint64_t matrix, bool transposed, int rows) {
  Span s{reinterpret_cast<const char*>(std::numeric_limits<uintptr_t>::max()), nullptr};
  for (int mn = 0; mn < rows; mn += transposed ? 8 : 1) {  // 16-byte chunks
    for (int k = 0; k < 16; k += transposed ? 1 : 8) {
      const char* p = element(matrix, transposed, mn, k);
      s = {p < s.begin ? p : s.begin, p + 16 > s.end ? p + 16 : s.end};
    }
  }
  return s;
}

void multiply(const Operation& operation) {
  const Product& p = operation.parts[0];
  static float a[64][16], b[256][16];
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      uint16_t bits;
      if (p.a) {  // register i of lane 4 g + t of warp w: rows 16 w + g (+ 8 for odd i), columns 2 t (+ 8 for i >= 2)
        const int lane = row / 16 * 32 + row % 8 * 4 + k % 8 / 2, i = row % 16 / 8 + k / 8 * 2;
        bits = static_cast<uint16_t>(operation.a[lane][i] >> (k % 2 * 16));
      } else {
        bits = bits_at(element(p.a_matrix, false, row, k));
      }
      a[row][k] = p.widen(bits);
    }
  }
  for (int n = 0; n < p.n; ++n) {
    for (int k = 0; k < 16; ++k) b[n][k] = p.widen(bits_at(element(p.b_matrix, p.b_transposed, n, k)));
  }
  for (int lane = 0; lane < kGroup; ++lane) {
    float* d = operation.parts[lane].d;
    for (int j = 0; j < p.n / 8; ++j) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 32 * 16 + lane % 32 / 4 + i / 2 * 8, column = 8 * j + lane % 4 * 2 + i % 2;
        double sum = p.accumulate ? d[4 * j + i] : 0.0;
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[column][k];
        d[4 * j + i] = static_cast<float>(sum);
      }
    }
  }
}

void finish(Operation& operation) {
  for (int lane = 0; lane < kGroup; ++lane) {
    const auto& before = operation.before[lane];
    std::copy(before.begin(), before.end(), operation.parts[lane].d);
  }
  multiply(operation);
}

void wake(Warpgroup& group) {
  const auto first = static_cast<size_t>(&group - warpgroups) * kGroup;
  for (size_t i = first; i < first + kGroup; ++i) {
    if (block.fibers[i].state == State::at_warpgroup) block.fibers[i].state = State::ready;
  }
}

// All 128 threads of a warpgroup come by; the last runs f(group), and they go on, or sleep on if it says so.
template <class F>
void together(void* part, Site site, const char* what, F&& f) {
  Warpgroup& group = warpgroups[self->id / kGroup];
  if (block.threads % kGroup) fault("a warpgroup of fewer than 128 threads", site);
  if (group.count && (group.first.line != site.line || std::strcmp(group.first.file, site.file) != 0)) {
    fault("threads of one warpgroup meet in different wgmma instructions", site);
  }
  group.first = site;
  group.arrived[self->id % kGroup] = part;
  if (++group.count < kGroup) return yield(State::at_warpgroup, site);
  group.count = 0;
  checker::pause(true);
  const bool sleeps = f(group);
  checker::pause(false);
  count(what, site);
  if (sleeps) return yield(State::at_warpgroup, site);
  wake(group);
}

template <class F>
void each_under_way(Warpgroup& group, F&& f) {
  for (auto& operation : group.open) f(operation);
  for (auto& operations : group.groups) {
    for (auto& operation : operations) f(operation);
  }
}

void write(const Transfer& t) {
  auto* to = const_cast<char*>(t.to.begin);
  if (!t.tensor) {
    std::memcpy(to, t.from, t.to.end - t.to.begin);
    return;
  }
  int row = 0;
  for (int w = 0; w < t.map.box[3]; ++w) {
    for (int z = 0; z < t.map.box[2]; ++z) {
      for (int y = 0; y < t.map.box[1]; ++y, ++row) {
        const int64_t at[4] = {t.at[0], t.at[1] + y, t.at[2] + z, t.at[3] + w};
        bool inside = true;
        for (int i = 1; i < 4; ++i) inside = inside && at[i] >= 0 && at[i] < t.map.size[i];
        const char* from = t.map.data + at[1] * t.map.stride[1] + at[2] * t.map.stride[2] + at[3] * t.map.stride[3];
        for (int x = 0; x < t.map.box[0]; ++x) {
          uint16_t bits = 0;
          const int64_t column = at[0] + x;
          if (inside && column >= 0 && column < t.map.size[0]) bits = bits_at(from + 2 * column);
          std::memcpy(to + row * 128 + ((x / 8) ^ (row % 8)) * 16 + x % 8 * 2, &bits, 2);
        }
      }
    }
  }
}

void land(const Transfer& t) {
  checker::pause(true);
  write(t);
  checker::pause(false);
  Fiber* const running = self;
  self = t.by;  // to the checks the copy is its issuer's
  checker::in_flight(t.to.begin, static_cast<int>(t.to.end - t.to.begin), false, t.site);
  checker::release(t.bar);
  self = running;
  Mbarrier& b = barriers.at(t.bar);
  b.bytes -= t.to.end - t.to.begin;
  advance(t.bar, b);
}

void start(Transfer&& t) {
  if (!find(t.bar, t.site).fenced) {
    fault("a copy signals an mbarrier whose initialisation no fence has made visible to it", t.site);
  }
  const auto begin = reinterpret_cast<uintptr_t>(t.to.begin);
  if (begin % (t.tensor ? 1024 : 16)) fault("a copy to an unaligned address", t.site);
  for (const Transfer& other : transfers) {
    if (other.to.meets(t.to)) fault("a copy into shared memory that a copy under way writes", t.site);
  }
  for (Warpgroup& group : warpgroups) {
    each_under_way(group, [&](Operation& o) {
      const Product& p = o.parts[0];
      if ((!p.a && span(p.a_matrix, false, 64).meets(t.to)) || span(p.b_matrix, p.b_transposed, p.n).meets(t.to)) {
        fault("a copy into shared memory that a wgmma under way reads", t.site);
      }
    });
  }
  const int bytes = static_cast<int>(t.to.end - t.to.begin);
  touch(t.to.begin, bytes, Access::write, t.site, "TMA");
  checker::in_flight(t.to.begin, bytes, true, t.site);
  if (options().eager) {
    land(t);
  } else {
    transfers.push_back(t);
  }
}

}  // namespace

unsigned shared_address(const void* p) { return static_cast<unsigned>(static_cast<const unsigned char*>(p) - arena); }

void mbarrier_init(uint64_t* bar, unsigned count, Site site) {
  if (reinterpret_cast<uintptr_t>(bar) % 8) fault("an unaligned mbarrier", site);
  barriers[bar] = {count, count};
  barriers[bar].maker = self->id;
}

void mbarrier_init_fence() {
  for (auto& [bar, b] : barriers) b.fenced = b.fenced || b.maker == self->id;
}

void mbarrier_arrive(uint64_t* bar, unsigned expected_bytes, Site site) {
  Mbarrier& b = find(bar, site);
  if (!b.pending) fault("more arrivals at an mbarrier than its phase takes", site);
  checker::release(bar);
  b.bytes += expected_bytes;
  --b.pending;
  advance(bar, b);
}

void mbarrier_wait(uint64_t* bar, unsigned parity, Site site) {
  while ((find(bar, site).phase & 1) == parity) {
    self->part = bar;
    yield(State::at_mbarrier, site);
    if (landing) {
      landing = false;
      const Transfer t = transfers.front();
      transfers.pop_front();
      land(t);
    }
  }
  checker::acquire(bar);
}

void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* bar, Site site) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16) fault("a bulk copy of unaligned addresses or size", site);
  touch(global, static_cast<int>(bytes), Access::read, site, "TMA");
  auto* to = static_cast<char*>(shared);
  start({{to, to + bytes}, static_cast<const char*>(global), {}, {}, false, bar, self, site});
}

void tensor_copy(void* shared, const TensorMap& map, const int (&at)[4], uint64_t* bar, Site site) {
  if (map.box[0] != 64) fault("a tensor map whose rows are not 128 bytes", site);
  auto* to = static_cast<char*>(shared);
  start({{to, to + 128 * map.box[1] * map.box[2] * map.box[3]},
         nullptr,
         map,
         {at[0], at[1], at[2], at[3]},
         true,
         bar,
         self,
         site});
}

void wgmma_fence() { fenced[self->id] = true; }

void wgmma(const Product& product, Site site) {
  if (!fenced[self->id]) fault("wgmma without a wgmma.fence since its registers were last used", site);
  Product mine = product;
  together(&mine, site, "wgmma", [&](Warpgroup& group) {
    Operation now;
    now.site = site;
    for (int lane = 0; lane < kGroup; ++lane) {
      const Product& p = now.parts[lane] = *static_cast<Product*>(group.arrived[lane]);
      if (p.a_matrix != now.parts[0].a_matrix || p.b_matrix != now.parts[0].b_matrix) {
        fault("threads of one warpgroup describe different matrices", site);
      }
      if (p.a) std::memcpy(now.a[lane], p.a, sizeof now.a[lane]);
    }
    const Product& p = now.parts[0];
    const Span b = span(p.b_matrix, p.b_transposed, p.n), a = p.a ? b : span(p.a_matrix, false, 64);
    for (const Transfer& t : transfers) {
      if (t.to.meets(a) || t.to.meets(b)) fault("wgmma reads shared memory that a copy under way writes", site);
    }
    if (options().eager) {
      multiply(now);
      return false;
    }
    bool first = true;
    each_under_way(group, [&](Operation& o) { first = first && o.parts[0].d != p.d; });
    for (int lane = 0; first && lane < kGroup; ++lane) {
      float* d = now.parts[lane].d;
      now.before[lane].assign(d, d + p.n / 2);
      std::fill(d, d + p.n / 2, std::numeric_limits<float>::quiet_NaN());
    }
    group.open.push_back(std::move(now));
    return false;
  });
  // Each thread answers for a share of the rows: 16 bytes of each, as the checks see it.
  const int lane = static_cast<int>(self->id) % kGroup;
  for (int mn = lane; mn < product.n; mn += kGroup) {
    if (product.b_transposed) break;
    for (int k = 0; k < 16; k += 8) touch(element(product.b_matrix, false, mn, k), 16, Access::read, site, "wgmma");
  }
  for (int i = lane; product.b_transposed && i < 2 * product.n; i += kGroup) {
    touch(element(product.b_matrix, true, i / 16 * 8, i % 16), 16, Access::read, site, "wgmma");
  }
  if (!product.a && lane < 64) {
    for (int k = 0; k < 16; k += 8) touch(element(product.a_matrix, false, lane, k), 16, Access::read, site, "wgmma");
  }
}

void wgmma_commit(Site site) {
  together(nullptr, site, "wgmma.commit_group", [](Warpgroup& group) {
    group.groups.push_back(std::move(group.open));
    group.open.clear();
    return false;
  });
}

void wgmma_wait(int groups_left, Site site) {
  fenced[self->id] = false;
  together(nullptr, site, "wgmma.wait_group", [&](Warpgroup& group) {
    group.left = groups_left;
    group.waiting = static_cast<int>(group.groups.size()) > groups_left;
    return group.waiting;
  });
}

void begin_asynchronous() {
  barriers.clear();
  transfers.clear();
  landing = false;
  for (Warpgroup& group : warpgroups) group = {};
  std::memset(fenced, 0, sizeof fenced);
}

bool land_one() {
  for (Warpgroup& group : warpgroups) {
    if (!group.waiting) continue;
    for (; static_cast<int>(group.groups.size()) > group.left; group.groups.pop_front()) {
      for (Operation& operation : group.groups.front()) finish(operation);
    }
    group.waiting = false;
    wake(group);
    return true;
  }
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
  for (const Warpgroup& group : warpgroups) {
    if (!group.open.empty() || !group.groups.empty()) return "the block ends while a wgmma is under way";
  }
  return "";
}

}  // namespace emulator
