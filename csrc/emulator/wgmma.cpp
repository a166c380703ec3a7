// wgmma and setmaxnreg; the rules are in hopper.h.
#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>

#include "asynchronous.h"
#include "hopper.h"

namespace emulator {
namespace {

constexpr int kGroup = 128, kGroups = kMostThreads / kGroup;
struct Operation {
  Product parts[kGroup];
  unsigned a[kGroup][4];
  std::vector<float> before[kGroup];  // the accumulators, where this operation is the first under way on them
  Site site;
};
struct Group {  // committed
  std::vector<Operation> operations;
  uint32_t time;  // of the warpgroup as an asynchronous unit
};
struct Warpgroup {
  void* arrived[kGroup];
  int count = 0;
  Site first;
  std::vector<Operation> open;
  std::deque<Group> groups;
  bool waiting = false;  // all its threads, for the groups but the last `left`
  int left = 0;
  bool spoiled = false;  // somebody wrote a register that was under way
  int registers = 0;     // of each thread

  unsigned first_thread() const;
};
Warpgroup warpgroups[kGroups];
unsigned Warpgroup::first_thread() const { return static_cast<unsigned>(this - warpgroups) * kGroup; }

struct Fenced {  // registers as a wgmma.fence saw them
  Registers at;
  std::vector<unsigned char> seen;
  bool used;  // as accumulators of a product since
};
std::vector<Fenced> fenced[kMostThreads];
int free_registers = 0;  // of the block, given back by setmaxnreg
int under_way = 0;       // products, of all warpgroups

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

void finish(Warpgroup& group, Operation& operation) {
  for (int lane = 0; lane < kGroup; ++lane) {
    const auto& before = operation.before[lane];
    const Product& p = operation.parts[lane];
    const bool kept = std::all_of(p.d, p.d + before.size(), [](float x) { return std::isnan(x); });
    group.spoiled = group.spoiled || !kept || (p.a && std::memcmp(p.a, operation.a[lane], sizeof operation.a[lane]));
    std::copy(before.begin(), before.end(), p.d);
  }
  multiply(operation);
  --under_way;
}

// What the checks see of a product: the bytes that it reads, 16 at a time, as the warpgroup's.
void read_matrices(const Operation& operation) {
  const Product& p = operation.parts[0];
  const auto read = [&](uint64_t matrix, bool transposed, int rows) {
    for (int mn = 0; mn < rows; mn += transposed ? 8 : 1) {
      for (int k = 0; k < 16; k += transposed ? 1 : 8) {
        touch(element(matrix, transposed, mn, k), 16, Access::read, operation.site, "wgmma from shared");
      }
    }
  };
  read(p.b_matrix, p.b_transposed, p.n);
  if (!p.a) read(p.a_matrix, false, 64);
}

void wake(Warpgroup& group) {
  const unsigned first = group.first_thread();
  for (unsigned i = first; i < first + kGroup; ++i) {
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
  for (auto& each : group.groups) {
    for (auto& operation : each.operations) f(operation);
  }
  for (auto& operation : group.open) f(operation);
}

}  // namespace

unsigned matrix_address(const void* p, unsigned stride, unsigned leading, Site site) {
  require_shared(p, 16, "a matrix descriptor", site);
  const auto address = static_cast<unsigned>(static_cast<const unsigned char*>(p) - arena);
  if (address >> 7 & 7) fault("a matrix descriptor of a row that is not the first of the swizzle's eight", site);
  if (stride % 16 || leading % 16 || (stride | leading) >> 18) {
    fault("a matrix descriptor whose strides are no multiples of 16 bytes below 2^18", site);
  }
  return address;
}

void wgmma_fence(std::initializer_list<Registers> registers, Site site) {
  std::vector<Fenced>& all = fenced[self->id];
  for (const Registers& each : registers) {
    std::erase_if(all, [&](const Fenced& f) { return f.at.data == each.data; });
    const auto* bytes = static_cast<const unsigned char*>(each.data);
    all.push_back({each, {bytes, bytes + each.bytes}, false});
  }
  together(nullptr, site, "wgmma.fence", [](Warpgroup&) { return false; });
}

namespace {

// The registers [data, data + bytes) are as the last fence saw them.
void require_fenced(const void* data, size_t bytes, bool accumulators, Site site) {
  const auto* from = static_cast<const unsigned char*>(data);
  for (Fenced& f : fenced[self->id]) {
    const auto* begin = static_cast<const unsigned char*>(f.at.data);
    if (from < begin || from + bytes > begin + f.at.bytes) continue;
    if (!f.used && std::memcmp(from, f.seen.data() + (from - begin), bytes) != 0) {
      fault("a register of a wgmma is written after the wgmma.fence", site);
    }
    f.used = f.used || accumulators;
    return;
  }
  fault("wgmma without a wgmma.fence since its registers were last used", site);
}

}  // namespace

void wgmma(const Product& product, Site site) {
  require_fenced(product.d, sizeof(float) * product.n / 2, true, site);
  if (product.a) require_fenced(product.a, sizeof(unsigned[4]), false, site);
  Product mine = product;
  together(&mine, site, "wgmma", [&](Warpgroup& group) {
    Operation now;
    now.site = site;
    for (int lane = 0; lane < kGroup; ++lane) {
      const Product& p = now.parts[lane] = *static_cast<Product*>(group.arrived[lane]);
      const Product& first = now.parts[0];
      if (p.a_matrix != first.a_matrix || p.b_matrix != first.b_matrix || p.accumulate != first.accumulate) {
        fault("threads of one warpgroup describe different matrices", site);
      }
      if (p.a) std::memcpy(now.a[lane], p.a, sizeof now.a[lane]);
    }
    const Product& p = now.parts[0];
    const Span b = span(p.b_matrix, p.b_transposed, p.n), a = p.a ? b : span(p.a_matrix, false, 64);
    if (copies_write(a) || copies_write(b)) fault("wgmma reads shared memory that a copy under way writes", site);
    checker::pause(false);
    checker::act_as(&group, group.first_thread(), kGroup);
    read_matrices(now);
    checker::act_no_more();
    checker::pause(true);
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
    ++under_way;
    return false;
  });
}

void wgmma_commit(Site site) {
  together(nullptr, site, "wgmma.commit_group", [](Warpgroup& group) {
    group.groups.push_back({std::move(group.open), checker::next_time(&group)});
    group.open.clear();
    return false;
  });
}

void wgmma_wait(int groups_left, Site site) {
  fenced[self->id].clear();
  together(nullptr, site, "wgmma.wait_group", [&](Warpgroup& group) {
    group.left = groups_left;
    group.waiting = static_cast<int>(group.groups.size()) > groups_left;
    return group.waiting;
  });
  if (warpgroups[self->id / kGroup].spoiled) {
    fault("a register of a wgmma was written before this wgmma.wait_group", site);
  }
}

bool is_register_under_way(const void* variable) {
  if (!under_way) return false;
  bool found = false;
  const auto lane = self->id % kGroup;
  const auto* at = static_cast<const char*>(variable);
  each_under_way(warpgroups[self->id / kGroup], [&](const Operation& o) {
    const Product& p = o.parts[lane];
    const auto within = [&](const void* data, size_t bytes) {
      return data && at - static_cast<const char*>(data) >= 0 &&
             at - static_cast<const char*>(data) < static_cast<std::ptrdiff_t>(bytes);
    };
    found = found || within(p.d, sizeof(float) * p.n / 2);
  });
  return found;
}

namespace {

// What ptxas gives a thread of a kernel that calls setmaxnreg, where a block has the multiprocessor to itself.
int registers_at_entry() {
  const int fit = 65536 / static_cast<int>(block.threads) / 8 * 8;
  return fit < 248 ? fit : 248;
}

}  // namespace

void set_registers(int wanted, bool more, Site site) {
  if (wanted < 24 || wanted > 256 || wanted % 8) fault("setmaxnreg of no multiple of 8 from 24 to 256", site);
  Warpgroup& group = warpgroups[self->id / kGroup];
  const bool fits = more ? wanted >= group.registers : wanted <= group.registers;
  if (!fits) fault("setmaxnreg takes registers with .dec, or gives them back with .inc", site);
  bool first = false;
  together(nullptr, site, "setmaxnreg", [&](Warpgroup&) {
    first = true;
    return false;
  });
  const int change = (wanted - group.registers) * kGroup;
  if (!first) {
    while (group.registers != wanted) yield(State::at_registers, site);
    return;
  }
  while (change > free_registers) yield(State::at_registers, site);
  free_registers -= change;
  group.registers = wanted;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::at_registers) fiber.state = State::ready;
  }
}

void begin_products() {
  for (Warpgroup& group : warpgroups) {
    group = {};
    group.registers = registers_at_entry();
  }
  for (unsigned i = 0; i < block.threads; ++i) fenced[i].clear();
  free_registers = under_way = 0;
}

bool finish_products() {
  for (Warpgroup& group : warpgroups) {
    if (!group.waiting) continue;
    for (; static_cast<int>(group.groups.size()) > group.left; group.groups.pop_front()) {
      for (Operation& operation : group.groups.front().operations) finish(group, operation);
      checker::learn(&group, group.groups.front().time, group.first_thread(), kGroup);
    }
    group.waiting = false;
    wake(group);
    return true;
  }
  return false;
}

bool products_under_way() {
  return std::any_of(std::begin(warpgroups), std::end(warpgroups),
                     [](const Warpgroup& group) { return !group.open.empty() || !group.groups.empty(); });
}

bool products_read(const Span& bytes) {
  bool found = false;
  for (Warpgroup& group : warpgroups) {
    each_under_way(group, [&](const Operation& o) {
      const Product& p = o.parts[0];
      found = found || (!p.a && span(p.a_matrix, false, 64).meets(bytes)) ||
              span(p.b_matrix, p.b_transposed, p.n).meets(bytes);
    });
  }
  return found;
}

void join_asynchronous() {  // a barrier of threads waits for nothing that is under way
  for (Warpgroup& group : warpgroups) {
    const auto again = [&](std::vector<Operation>& operations) {
      checker::act_again(&group);
      for (const Operation& operation : operations) read_matrices(operation);
      checker::act_no_more();
    };
    for (Group& each : group.groups) {
      if (!each.operations.empty()) again(each.operations);
      each.time = checker::next_time(&group);
    }
    if (!group.open.empty()) again(group.open);
  }
}

}  // namespace emulator
