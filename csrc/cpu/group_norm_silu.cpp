// GroupNorm (Wu & He 2018, arXiv:1803.08494) and SiLU: y = z · s, z = x̂ · w + b, s = 1 / (1 + exp(−z)),
// x̂ = (x − mean) · rstd; the variance in a second pass, so that a large mean cancels nothing.
// Backward, with d = dy · s · (1 + z · (1 − s)) and sums over a channel's positions p:
//   db = Σ_p d,   dw = Σ_p d · x̂,   dx = rstd · (d · w − Σ_c w · db / n − x̂ · Σ_c w · dw / n)
// where n counts the elements of a group and c its channels: the group's two means follow from the channels' sums.
//
// A group of an image is contiguous and one task; the sums over images are added in order. Memory: forward reads x and
// writes y, backward reads dy and x and writes dx (a group is served by L1 or L2 between the passes). About 32 and 50
// FLOPs an element; exp is 18 of them, in the backward pass twice where a group is too large to keep d. Arithmetic is
// fp32.
#include "finetune/group_norm_silu.h"

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int64_t kKept = 16384;  // elements of a group whose d is kept between the passes, 64 KiB

// total[0] += v, where total[1] collects what the additions round away (Knuth's two-sum): a channel's terms are many and
// their sum is small.
FINETUNE_INLINE void add_exactly(vf* total, vf v) {
  const vf sum = total[0] + v, added = sum - total[0];
  total[1] += (total[0] - (sum - added)) + (v - added);
  total[0] = sum;
}

FINETUNE_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

// body(group of an image) in parallel.
template <class Args, class Body>
void for_each_unit(const Args& a, Body&& body) {
  const int64_t elements = a.channels / a.groups * a.positions;
  parallel_for(a.images * a.groups, 1 + 8192 / (elements + 1), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) body(unit);
  });
}

template <class T>
void forward(const GroupNormSilu& a) {
  const auto* w = static_cast<const T*>(a.weight);
  const auto* b = static_cast<const T*>(a.bias);
  const int64_t channels = a.channels / a.groups, elements = channels * a.positions;
  const float n = static_cast<float>(elements);
  for_each_unit(a, [&](int64_t unit) {
    const T* x = static_cast<const T*>(a.x) + unit * elements;
    T* y = static_cast<T*>(a.y) + unit * elements;
    if (!elements) return void(a.mean[unit] = a.rstd[unit] = 0);
    float total[1], center[kLanes];  // center: loaded like x, so that the lanes past the end differ by zero
    sum_vectors(elements, total, [&](vf* sums, int64_t i, auto get) { sums[0] += get(x + i); });
    const float mean = total[0] / n;
    store(center, set1(mean));
    sum_vectors(elements, total, [&](vf* sums, int64_t i, auto get) {
      const vf v = get(x + i) - get(center);
      sums[0] += v * v;
    });
    const float rstd = 1.0f / __builtin_sqrtf(total[0] / n + a.eps);
    a.mean[unit] = mean, a.rstd[unit] = rstd;
    for (int64_t c = 0, first = unit % a.groups * channels; c < channels; ++c) {
      const float scale = to_float(w[first + c]), shift = to_float(b[first + c]);
      for_each_vector(a.positions, [&](int64_t i, auto get, auto put) {
        const vf z = (get(x + c * a.positions + i) - mean) * rstd * scale + shift;
        put(y + c * a.positions + i, z * sigmoid(z));
      });
    }
  });
}

template <class T>
void backward(const GroupNormSiluBackward& a) {
  const auto* w = static_cast<const T*>(a.weight);
  const auto* b = static_cast<const T*>(a.bias);
  const int64_t channels = a.channels / a.groups, elements = channels * a.positions, all = a.images * a.channels;
  const float n = static_cast<float>(elements);
  for_each_unit(a, [&](int64_t unit) {
    const int64_t first = unit % a.groups * channels;
    const T *x = static_cast<const T*>(a.x) + unit * elements, *dy = static_cast<const T*>(a.dy) + unit * elements;
    T* dx = static_cast<T*>(a.dx) + unit * elements;
    float *dw = a.partial + unit * channels, *db = dw + all;
    const float mean = a.mean[unit], rstd = a.rstd[unit];
    float push = 0, pull = 0, buffer[kKept + kLanes];
    float* const kept = elements <= kKept ? buffer : nullptr;  // d
    // d, where v becomes x̂
    const auto slope = [&](vf d, vf& v, float scale, float shift) {
      v = (v - mean) * rstd;
      const vf z = v * scale + shift, s = sigmoid(z);
      return d * s * (1.0f + z * (1.0f - s));
    };
    for (int64_t c = 0; c < channels; ++c) {
      const float scale = to_float(w[first + c]), shift = to_float(b[first + c]);
      float sums[4];
      sum_vectors(a.positions, sums, [&](vf* total, int64_t i, auto get) {
        vf v = get(x + c * a.positions + i);
        const vf d = slope(get(dy + c * a.positions + i), v, scale, shift);
        if (kept) store(kept + c * a.positions + i, d);  // past a channel's end, where the next one's begins
        add_exactly(total, d);
        add_exactly(total + 2, d * v);
      });
      db[c] = sums[0] + sums[1], dw[c] = sums[2] + sums[3];
      push += scale * db[c], pull += scale * dw[c];
    }
    push /= n, pull /= n;
    for (int64_t c = 0; c < channels; ++c) {
      const float scale = to_float(w[first + c]), shift = to_float(b[first + c]);
      for_each_vector(a.positions, [&](int64_t i, auto get, auto put) {
        vf v = get(x + c * a.positions + i);
        const int64_t at = c * a.positions + i;
        const vf d = kept ? get(kept + at) : slope(get(dy + at), v, scale, shift);
        if (kept) v = (v - mean) * rstd;
        put(dx + c * a.positions + i, (d * scale - push - v * pull) * rstd);
      });
    }
  });
  const auto add_images = [&](const float* partial, T* sum) {
    for_each_vector(a.channels, [&](int64_t i, auto get, auto put) {
      vf total{};
      for (int64_t image = 0; image < a.images; ++image) total += get(partial + image * a.channels + i);
      put(sum + i, total);
    });
  };
  add_images(a.partial, static_cast<T*>(a.dweight));
  add_images(a.partial + all, static_cast<T*>(a.dbias));
}

Status group_norm_silu(const GroupNormSilu& a) {
  a.dtype == DType::f32 ? forward<float>(a) : forward<bf16>(a);
  return Status::ok;
}

Status group_norm_silu_backward(const GroupNormSiluBackward& a) {
  a.dtype == DType::f32 ? backward<float>(a) : backward<bf16>(a);
  return Status::ok;
}

FINETUNE_REGISTER(GroupNormSilu, group_norm_silu);
FINETUNE_REGISTER(GroupNormSiluBackward, group_norm_silu_backward);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
