// Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438), backwards in time:
//   δ = r + γ · V(next) − V (without V(next) where terminated),   A ← δ + γ λ · A (without A at the end of a segment).
//
// Memory: (steps, columns); a task goes down a block of columns, whose running A stay in registers or L1, and reads
// each row's piece once: 14 bytes in and 8 out an element in fp32. 7 FLOPs an element: the roof is memory bandwidth,
// and for a single column the latency of one multiply-add a step.
#include "finetune/gae.h"

#include <type_traits>

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int64_t kColumns = 64;

FINETUNE_INLINE double to_float(double x) { return x; }

// x, or 0 where the flag is set (1 and not 0), also of a NaN. By bits: a condition here keeps GCC from vectorizing.
template <class Real>
FINETUNE_INLINE Real unless(uint8_t flag, Real x) {
  std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t> bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= static_cast<decltype(bits)>(flag) - 1;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

template <class T, class Real>
void scan(const Gae& a) {
  const auto gamma = static_cast<Real>(a.gamma), decay = static_cast<Real>(a.decay);
  const int64_t blocks = (a.columns + kColumns - 1) / kColumns;
  parallel_for(blocks, 1 + 32768 / (a.steps * kColumns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumns, left = a.columns - first, count = left < kColumns ? left : kColumns;
      Real advantage[kColumns] = {};
      for (int64_t t = a.steps - 1; t >= 0; --t) {
        const int64_t at = t * a.columns + first;
        const T *reward = static_cast<const T*>(a.rewards) + at, *value = static_cast<const T*>(a.values) + at,
                *next = static_cast<const T*>(a.next_values) + at;
        // As bytes: GCC 12 vectorizes no loop that loads a bool. They might alias anything, hence the pragma.
        const auto *terminated = reinterpret_cast<const uint8_t*>(a.terminated) + at,
                   *truncated = reinterpret_cast<const uint8_t*>(a.truncated) + at;
        Real *advantages = static_cast<Real*>(a.advantages) + at, *returns = static_cast<Real*>(a.returns) + at;
#if !defined(__clang__)
#pragma GCC ivdep
#endif
        for (int64_t j = 0; j < count; ++j) {
          const Real v = to_float(value[j]), future = gamma * to_float(next[j]), later = decay * advantage[j];
          const Real delta = to_float(reward[j]) + unless(terminated[j], future) - v;
          advantage[j] = delta + unless(terminated[j] | truncated[j], later);
          advantages[j] = advantage[j];
          returns[j] = advantage[j] + v;
        }
      }
    }
  });
}

Status gae(const Gae& a) {
  switch (a.dtype) {
    case DType::f32:
      return scan<float, float>(a), Status::ok;
    case DType::bf16:
      return scan<bf16, float>(a), Status::ok;
    case DType::f64:
      return scan<double, double>(a), Status::ok;
    case DType::f16:
      break;
  }
  return Status::unsupported;
}

FINETUNE_REGISTER(Gae, gae);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
