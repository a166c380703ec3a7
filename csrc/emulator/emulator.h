// The CUDA execution model on the CPU, for the kernels of csrc/cuda as they stand: every thread of a block is a fiber,
// blocks run one after another, a warp's collective is executed by the last of its lanes to arrive. Nothing here is
// fast, and nothing here is timed: it finds wrong numbers, and, in the checked build, wrong memory accesses, races and
// missing barriers, by source line.
//
// The faces: `allow` and `take_fault` for the bindings, `launch` for csrc/cuda/device/launch.cuh, the rest for cuda.h and
// ptx.cuh, which give the kernels their CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

struct Site {  // where in the source
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// --- for the bindings

enum class Use { read, write, read_write };  // write: the contents count as undefined until they are written
void allow(const void* data, int64_t bytes, Use use);
// What went wrong since the last call, or ""; also ends the permission to touch what `allow` named.
std::string take_fault();

// --- for launch.cuh

// body(context) is what each thread runs; the context, of `context_bytes` bytes, holds the kernel's arguments.
bool run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context,
              size_t context_bytes);

// --- for the kernels

const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();
unsigned lane_index();

[[noreturn]] void fault(const char* what, Site site);  // ends the launch

// What an instruction asks of an address: the state space (README.md says which does what), and a multiple of `align`
// bytes. `what`: the access, for the message ("a global store").
void require_global(const void* p, int align, const char* what, Site site);
void require_shared(const void* p, int align, const char* what, Site site);
void require_memory(const void* p, int align, const char* what, Site site);  // either of the two

void block_barrier(Site site);
void named_barrier(int id, int threads, Site site);  // bar.sync id, threads: whole warps
void warp_barrier(uint32_t mask, Site site);

// Every lane of `mask` calls this with the same `run`; the last to arrive calls run(parts, mask), where parts[lane] is
// what that lane passed (null outside of the mask). `what`: its name in the statistics (null: it
// is counted by its accesses). aligned: all lanes must come by the same line (PTX's .aligned).
void collective(uint32_t mask, void (*run)(void* const* parts, uint32_t mask, Site site), void* part, Site site,
                const char* what = "collective", bool aligned = false);

// A block's static shared array: the same memory for all threads that come by `key`.
void* shared_array(const void* key, size_t bytes, size_t align, const char* name, Site site);
void* dynamic_shared();
size_t dynamic_shared_bytes();

// Asynchronous copies of 4, 8 or 16 bytes to shared memory. Lazy: made when they are waited for; eager: at once.
void copy_async(void* shared, const void* global, int bytes, int bytes_read, Site site);
void copy_commit();
void copy_wait(int groups_left, Site site);

// Memory traffic that the compiler's instrumentation does not see (tensor-core operands, atomics): for the checks.
// `what`: its name in the statistics, where it is no plain load or store.
enum class Access { read, write, atomic };
void touch(const void* data, int bytes, Access access, Site site, const char* what = nullptr);
void touch_constant(const void* data, int bytes, Site site);  // a read of what nobody writes while the kernel runs
void count(const char* what, Site site);                      // one more of these, for the statistics
// The compiler's instrumentation leaves this function out.
#define EMULATOR_UNCHECKED __attribute__((no_sanitize("thread")))

// Is this deliberate fault of a kernel switched on? finetune/kernels/weave.py writes the calls into its copy of csrc/cuda.
bool bug(const char* name);
bool bug_reached();  // has a kernel asked for the active one?

// --- for tests (csrc/emulator/python.cpp)

struct Options {
  int order = 0;  // of the fibers: 0 as numbered, 1 reversed, 2 … shuffled by that seed. Odd: the last TMA copy lands
                  // first
  bool eager = false;  // asynchronous copies
  std::string bug;     // the active deliberate fault
};
Options& options();

// Accesses and instructions by source line, counted by the checked build while switched on (which also forgets what was
// counted before). width: most bytes a lane asked for at once; units: 32-byte sectors of global memory, wavefronts of
// shared memory; ideal: as few as would do.
struct Row {
  std::string file;
  int line;
  std::string kind;
  long requests, units, ideal, width;
};
void set_counting(bool on);
uint64_t take_largest_grid();  // blocks of the largest launch since the last call
std::vector<Row> statistics();

template <class T>
T& shared(const void* key, const char* name, Site site = Site::here()) {
  return *static_cast<T*>(shared_array(key, sizeof(T), alignof(T) < 16 ? 16 : alignof(T), name, site));
}

}  // namespace emulator
