// What every kernel shares: element types, status, the CPU level, the thread pool. No framework here.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <type_traits>

namespace finetune {

enum class DType : int { f32, bf16, f16, f64 };  // f16: GPU kernels only; f64: gae on the CPU only
constexpr int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
// no_kernel: none for this GPU's architecture; no_tensor_map: the driver refuses the map that a kernel copies by.
enum class Status : int { ok, unsupported, failed, no_kernel, no_tensor_map };

// Why the last launch of this thread failed, in CUDA's words, and with which versions (13000 is CUDA 13.0).
struct Failure {
  const char* text = nullptr;
  int driver = 0, runtime = 0;  // the newest CUDA that the driver can run; of the runtime linked in
};
inline thread_local Failure failure{};

// One line for people.
inline std::string message_of(Status status) {
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  switch (status) {
    case Status::ok:
      return "";
    case Status::unsupported:
      return "the kernel does not support these arguments";
    case Status::no_kernel:
      return "the library holds no kernel for this GPU: FINETUNE_CUDA_ARCHS=<its architecture> pip install -e . builds "
             "one";
    case Status::no_tensor_map:
      return "the driver refuses the tensor map (cuTensorMapEncodeTiled)";
    case Status::failed:
      break;
  }
  std::string text = "the kernel could not be launched";
  if (failure.text) text += std::string(": ") + failure.text;
  const int cuda = failure.runtime / 1000, wanted = cuda == 13 ? 580 : cuda == 12 ? 525 : 0;  // of NVIDIA's table
  if (failure.runtime && failure.driver < failure.runtime && cuda > failure.driver / 1000) {
    text += "; the driver " + (failure.driver ? "runs CUDA up to " + version(failure.driver) : "is absent") +
            ", the library holds the runtime of CUDA " + version(failure.runtime);
    if (wanted) text += ", which needs driver " + std::to_string(wanted) + " or later";
    text += ": update the driver, or build with an older CUDA toolkit";
  }
  return text;
}

// Levels of the CPU instruction set, in rising order: a kernel compiled for one runs on all above it.
// avx512vnni: AVX-512 with VNNI and BF16.
enum class Level : int { portable, avx2, avx512, avx512vnni, amx };
constexpr int kLevels = 5;
constexpr std::array<const char*, kLevels> kLevelNames{"portable", "avx2", "avx512", "avx512vnni", "amx"};

Level supported_level();   // the highest level of this machine
Level level();             // the level in use: supported_level() unless FINETUNE_CPU or set_level() says lower
bool set_level(Level at);  // false, and nothing changes, if this machine does not support it

// The kernels of one op, by level; each level's translation unit adds its own. `Args` is the op's
// argument struct, so the pair (Args, level) names one compiled function.
template <class Args>
struct Kernels {
  static inline std::array<Status (*)(const Args&), kLevels> by_level{};
};

template <class Args>
struct Register {
  Register(Level at, Status (*kernel)(const Args&)) { Kernels<Args>::by_level[static_cast<int>(at)] = kernel; }
};

// Runs the best kernel compiled for `Args` that the level in use allows.
template <class Args>
Status launch(const Args& args) {
  for (int at = static_cast<int>(level()); at >= 0; --at) {
    if (auto* kernel = Kernels<Args>::by_level[at]) return kernel(args);
  }
  return Status::unsupported;
}

// The CUDA kernel of `Args`, on pointers to device memory, queued on `stream` (a cudaStream_t); csrc/cuda/<op>.cu
// specializes it. The emulator runs the same source on the CPU.
template <class Args>
Status launch_cuda(const Args& args, void* stream);

// Work is spread over the host framework's thread pool; without one it runs on the calling thread.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t tasks, int64_t grain, Body body, void* context);
void set_thread_pool(ParallelFor parallel_for, int (*threads)());
void run_parallel(int64_t tasks, int64_t grain, Body body, void* context);
int threads();

// body(begin, end) over [0, tasks), split into contiguous ranges of at least `grain` tasks.
template <class F>
void parallel_for(int64_t tasks, int64_t grain, F&& body) {
  run_parallel(
      tasks, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
      },
      &body);
}

}  // namespace finetune
