// What every binding needs of torch (its stable ABI: the library built here loads in later releases too).
#pragma once

// One binding serves three builds of an operator: CPU kernels (dispatch key CPU), CUDA kernels where nvcc built them
// (FINETUNE_CUDA, key CUDA), and, in the test-only library finetune_emulated, the CUDA kernels run by the emulator on
// CPU tensors (FINETUNE_EMULATED, key CPU).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // before torch 2.13 it had the other name
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

#include "finetune/kernel.h"
#if defined(FINETUNE_EMULATED)
#include "emulator.h"
#endif

#if !defined(FINETUNE_LIBRARY)  // the emulator's builds have names of their own
#define FINETUNE_LIBRARY finetune
#endif
#if defined(FINETUNE_EMULATED) || defined(FINETUNE_CUDA)
#define FINETUNE_DEVICE 1  // there are CUDA kernels to launch
#else
#define FINETUNE_DEVICE 0
#endif

// FINETUNE_SCHEMAS(m) { m.def(…); }   FINETUNE_KERNELS(m) { m.impl(…); }   once each in a binding
#define FINETUNE_SCHEMAS(m) FINETUNE_SCHEMAS_OF(FINETUNE_LIBRARY, m)
#define FINETUNE_SCHEMAS_OF(library, m) STABLE_TORCH_LIBRARY_FRAGMENT(library, m)
#define FINETUNE_KERNELS(m) FINETUNE_KERNELS_OF(FINETUNE_LIBRARY, m)
// FINETUNE_KERNEL(m, "name", function) in FINETUNE_KERNELS: the only way in. All tensors of a call are on one device,
// or it is an error: a kernel takes whatever address it gets. More numbers name arguments that may also be on the CPU.
#define FINETUNE_KERNEL(m, name, function, ...) \
  m.impl(name, TORCH_BOX((&OnOneDevice<name, &function __VA_OPT__(, ) __VA_ARGS__>::call)))
#if defined(FINETUNE_CUDA)
#define FINETUNE_KERNELS_OF(library, m)                                                     \
  static void implement(torch::stable::detail::StableLibrary& m);                           \
  STABLE_TORCH_LIBRARY_IMPL(library, CPU, kernels_on_cpu) { implement(kernels_on_cpu); }    \
  STABLE_TORCH_LIBRARY_IMPL(library, CUDA, kernels_on_cuda) { implement(kernels_on_cuda); } \
  static void implement(torch::stable::detail::StableLibrary& m)
#else
#define FINETUNE_KERNELS_OF(library, m) STABLE_TORCH_LIBRARY_IMPL(library, CPU, m)
#endif

#if defined(FINETUNE_CUDA)  // a symbol of CUDA builds of torch, absent from CPU builds
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace finetune {

// Bindings with and without CUDA kernels are linked into one library: what differs between them needs two names.
#if defined(FINETUNE_CUDA)
inline namespace with_cuda {
#else
inline namespace without_cuda {
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Does a call on this tensor run a CUDA kernel?
inline bool on_device([[maybe_unused]] const Tensor& t) {
#if defined(FINETUNE_EMULATED)
  return true;
#elif defined(FINETUNE_CUDA)
  return t.is_cuda();
#else
  return false;
#endif
}

inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  const auto type = t.device().type();
  if (type == torch::headeronly::DeviceType::Meta) return "meta";
  const std::string name = t.is_cuda() ? "cuda" : "device type " + std::to_string(static_cast<int>(type));
  return name + ":" + std::to_string(t.get_device_index());
}

// Looks at the arguments of a call one after another.
struct Devices {
  const char* op;
  uint64_t may_be_on_cpu;  // a bit an argument
  int at = 0;              // of the argument
  std::optional<Tensor> first;

  void look(const Tensor& t) {
    if (t.is_cpu() && may_be_on_cpu >> at & 1) return;
    if (!first) first = t;
    STD_TORCH_CHECK(t.device() == first->device(), "finetune::", op,
                    ": Expected all tensors to be on the same device, but found at least two devices, ",
                    device_of(*first), " and ", device_of(t), "! (argument ", at + 1, " is on ", device_of(t), ")");
  }
  void look(const std::optional<Tensor>& t) {
    if (t) look(*t);
  }
  void look(const std::vector<Tensor>& tensors) {
    for (const Tensor& t : tensors) look(t);
  }
  template <class T>
  void look(const T&) {  // no tensor
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T> || std::is_same_v<T, std::string> ||
                      std::is_same_v<T, std::optional<bool>>,
                  "an argument of this type may hold tensors: say how to look at them");
  }
};

template <size_t N>
struct Text {  // a string as a template argument
  char at[N];
  constexpr Text(const char (&text)[N]) { std::copy(text, text + N, at); }
};

template <Text name, auto function, int... may_be_on_cpu>
struct OnOneDevice;
template <Text name, class R, class... A, R (*function)(A...), int... may_be_on_cpu>
struct OnOneDevice<name, function, may_be_on_cpu...> {
  static R call(A... arguments) {
    Devices devices{name.at, ((uint64_t{1} << may_be_on_cpu) | ... | uint64_t{0}), 0, {}};
    ((devices.look(arguments), ++devices.at), ...);
    return function(std::forward<A>(arguments)...);
  }
};

inline Tensor empty_f32(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

// half_on_cpu: does the op's CPU kernel take float16?
inline DType dtype_of(const Tensor& t, bool half_on_cpu = false) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      STD_TORCH_CHECK(half_on_cpu || on_device(t), "finetune: the CPU kernels take float32 and bfloat16, got float16");
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "finetune: expected float32, bfloat16 or float16");
  }
}

inline void check(bool holds, const char* op, const char* what) {
  STD_TORCH_CHECK(holds, "finetune::", op, ": ", what);
}

// A gradient that comes in has its result's shape and dtype.
inline void check_gradient(const Tensor& dy, const Tensor& y, const char* op) {
  check(dy.sizes().equals(y.sizes()) && dy.scalar_type() == y.scalar_type(), op,
        "the gradient must have the result's shape and dtype");
}

inline void check_status(Status status, const char* op) {
  if (status != Status::ok) check(false, op, message_of(status).c_str());
}

// Runs the CPU kernel of `args`; the emulator's libraries hold none.
template <class Args>
void run(const char* op, const Args& args) {
  check_status(launch(args), op);
}

// The memory of a tensor as a kernel's argument: read, written (its contents count as undefined until then), or both.
// The emulator learns here which bytes a kernel may touch, and how.
inline const void* in(const Tensor& t);
inline void* out(const Tensor& t);
inline void* inout(const Tensor& t);

#if defined(FINETUNE_EMULATED)
inline int64_t extent(const Tensor& t) {  // bytes from the first element's to the last one's end
  if (!t.numel()) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return (last + 1) * t.element_size();
}
// A tensor that spans a great deal of memory is allowed part by part along its widest dimension, without gaps.
inline void allow(const Tensor& t, const void* data, emulator::Use use) {
  const int64_t bytes = extent(t);
  int64_t widest = 0, span = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    const int64_t here = (t.size(i) - 1) * t.stride(i) * t.element_size();
    if (here > span) widest = i, span = here;
  }
  if (bytes < int64_t{1} << 30) return emulator::allow(data, bytes, use);
  const int64_t step = t.stride(widest) * static_cast<int64_t>(t.element_size()), part = bytes - span;
  if (part >= step) return emulator::allow(data, bytes, use);  // there are no gaps
  for (int64_t i = 0; i < t.size(widest); ++i) {
    emulator::allow(static_cast<const char*>(data) + i * step, part, use);
  }
}
inline const void* in(const Tensor& t) {
  allow(t, t.const_data_ptr(), emulator::Use::read);
  return t.const_data_ptr();
}
inline void* out(const Tensor& t) {
  allow(t, t.mutable_data_ptr(), emulator::Use::write);
  return t.mutable_data_ptr();
}
inline void* inout(const Tensor& t) {
  allow(t, t.mutable_data_ptr(), emulator::Use::read_write);
  return t.mutable_data_ptr();
}
#else
inline const void* in(const Tensor& t) { return t.const_data_ptr(); }
inline void* out(const Tensor& t) { return t.mutable_data_ptr(); }
inline void* inout(const Tensor& t) { return t.mutable_data_ptr(); }
#endif
// As an array of T: of that dtype (char: of any) and contiguous, or it is an error.
template <class T>
const Tensor& array_of(const Tensor& t) {
  constexpr bool any = std::is_same_v<T, char>, floats = std::is_same_v<T, float>,
                 integers = std::is_same_v<T, int64_t>, short_integers = std::is_same_v<T, int32_t>,
                 bytes = std::is_same_v<T, uint8_t>;
  static_assert(any || floats || integers || short_integers || bytes || std::is_same_v<T, bool>);
  constexpr ScalarType wanted = floats           ? ScalarType::Float
                                : integers       ? ScalarType::Long
                                : short_integers ? ScalarType::Int
                                : bytes          ? ScalarType::Byte
                                                 : ScalarType::Bool;
  constexpr const char* name = floats           ? "float32"
                               : integers       ? "int64"
                               : short_integers ? "int32"
                               : bytes          ? "uint8"
                                                : "bool";
  STD_TORCH_CHECK(any || t.scalar_type() == wanted, "finetune: expected a tensor of ", name, ", got scalar type ",
                  static_cast<int>(t.scalar_type()));
  STD_TORCH_CHECK(t.is_contiguous(), "finetune: expected a contiguous tensor");
  return t;
}
template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(in(array_of<T>(t)));
}
template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(out(t));
}
template <class T>
T* inout(const Tensor& t) {
  return static_cast<T*>(inout(array_of<T>(t)));
}

// A number that stays where it is: nobody reads it on the host.
inline const float* one_float(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Float, "finetune::", op, ": ", name,
                  " must be one float32 number");
  return in<float>(t);
}

#if FINETUNE_DEVICE
// Launches the CUDA kernel of `args` on the device and current stream of `on`.
template <class Args>
Status launch_on(const char* op, [[maybe_unused]] const Tensor& on, const Args& args) {
#if defined(FINETUNE_EMULATED)
  const Status status = launch_cuda(args, nullptr);
  const std::string fault = emulator::take_fault();
  STD_TORCH_CHECK(fault.empty(), "finetune::", op, ": ", fault);
  return status;
#else
  check(on.is_cuda(), op, "expected CUDA tensors");
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream && !aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream), op,
        "this torch has no CUDA streams");
  return launch_cuda(args, stream);
#endif
}
template <class Args>
void run_device(const char* op, const Tensor& on, const Args& args) {
  check_status(launch_on(op, on, args), op);
}
#endif

// Runs the kernel of `args` where the tensor `on` lives.
template <class Args>
void run(const char* op, const Tensor& on, const Args& args) {
#if defined(FINETUNE_EMULATED)
  run_device(op, on, args);
#else
#if defined(FINETUNE_CUDA)
  if (on.is_cuda()) return run_device(op, on, args);
#endif
  check(on.is_cpu(), op, "expected CPU tensors");
  run(op, args);
#endif
}

// A tensor (..., dim) seen as (rows, dim) with adjacent elements in a row and one stride between rows: halves of a
// fused projection and the like are read in place, anything else is copied.
struct Rows {
  Tensor tensor;
  int64_t rows = 1, dim = 0, stride = 0;

  explicit Rows(const Tensor& t) : tensor(fits(t) ? t : torch::stable::contiguous(t)) {
    const int64_t last = tensor.dim() - 1;
    dim = tensor.size(last);
    stride = dim;
    for (int64_t i = last - 1, found = 0; i >= 0; --i) {
      if (tensor.size(i) != 1 && !found++) stride = tensor.stride(i);
      rows *= tensor.size(i);
    }
  }

 private:
  static bool fits(const Tensor& t) {
    const int64_t last = t.dim() - 1;
    check(last >= 0, "ops", "a tensor needs at least one dimension");
    if (t.size(last) != 1 && t.stride(last) != 1) return false;
    for (int64_t i = last - 1, next = -1; i >= 0; --i) {
      if (t.size(i) == 1) continue;
      if (next >= 0 && t.stride(i) != next) return false;
      next = t.stride(i) * t.size(i);
    }
    return true;
  }
};

}  // namespace with_cuda or without_cuda
}  // namespace finetune
