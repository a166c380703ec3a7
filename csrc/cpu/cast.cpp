// Conversion between floating-point formats, to nearest or stochastically.
//
// Memory: reads x and writes y once: 5 bytes an element from fp32 to 8 bits. About 15 operations an element, or 45 with
// the random numbers (a Philox of ten rounds makes four words): memory bandwidth is the roof of the former, the integer
// units that of the latter.
#include "finetune/cast.h"

#include "formats.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int kBlock = 4 * kLanes;  // elements of one set of random words

template <class From, class To, bool kStochastic>
FINETUNE_INLINE void block(const Cast& a, int64_t at, const From* x, To* y, uint32_t over) {
  vu random[4] = {};
  if (kStochastic) random_words(at, a.seed, random);
  for (int j = 0; j < 4; ++j) {
    const vf value = load(x + j * kLanes) * a.scale;
    store_rounded<To, kStochastic>(y + j * kLanes, value, random[j], over);
  }
}

template <class From, class To, bool kStochastic>
void convert(const Cast& a) {
  constexpr int64_t task = 16384;  // a multiple of every kBlock
  uint32_t over;
  if constexpr (kFormat<To> == Format::f32) {
    over = a.saturate ? 0x7f7fffffu : 0x7f800000u;
  } else {
    over = a.saturate ? LayoutOf<kFormat<To>>::largest : LayoutOf<kFormat<To>>::beyond;
  }
  parallel_for((a.size + task - 1) / task, 1, [&](int64_t begin, int64_t end) {
    const From* x = static_cast<const From*>(a.x);
    To* y = static_cast<To*>(a.y);
    const int64_t last = end * task < a.size ? end * task : a.size;
    int64_t at = begin * task;
    for (; at + kBlock <= last; at += kBlock) block<From, To, kStochastic>(a, at, x + at, y + at, over);
    if (at < last) {
      From given[kBlock] = {};
      To made[kBlock];
      std::memcpy(given, x + at, (last - at) * sizeof(From));
      block<From, To, kStochastic>(a, at, given, made, over);
      std::memcpy(y + at, made, (last - at) * sizeof(To));
    }
  });
}

template <class F>
void for_format(Format format, F&& f) {
  switch (format) {
    case Format::f32:
      return f(float{});
    case Format::bf16:
      return f(bf16{});
    case Format::f16:
      return f(f16{});
    case Format::e4m3:
      return f(fp8{});
    case Format::e5m2:
      return f(e5m2{});
  }
}

Status cast(const Cast& a) {
  for_format(a.from, [&](auto from) {
    for_format(a.to, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      if constexpr (kFormat<To> != Format::f32) {
        if (a.stochastic) return convert<From, To, true>(a);
      }
      convert<From, To, false>(a);
    });
  });
  return Status::ok;
}

FINETUNE_REGISTER(Cast, cast);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
