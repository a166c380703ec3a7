// y = x Wᵀ + bias with a packed weight (packed_product.h): rows of x are prepared in parallel, then panels of W.
//
// Bytes: the weight once, 4 · m · (depth + rows) of x and y; 2 · m · rows · depth FLOPs. For one row of x 1 to 4 FLOPs a
// byte, far below what the vector units need to be busy: memory bandwidth is the roof.
#include "finetune/quantized_linear.h"

#include "packed_product.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

template <class T>
void run(const QuantizedLinear& a) {
  const PackedWeight& w = a.weight;
  const T *x = static_cast<const T*>(a.x), *bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y);
  const Prepared to = prepared(w, a.m, sizeof(T) == 4, a.workspace);
  parallel_for(a.m, 1 + 32768 / (w.depth + 1),
               [&](int64_t begin, int64_t end) { prepare(w, x, a.stride, begin, end, to); });
  const int64_t work = w.words() * kPanel * (a.m + 4);  // of a panel, in words times rows
  parallel_for(w.panels(), 1 + 65536 / (work + 1), [&](int64_t begin, int64_t end) {
    product(w, to, a.m, begin, end, [&](int64_t panel, int64_t row, const float* sums) {
      const int64_t n = panel * kPanel, lanes = w.rows - n < kPanel ? w.rows - n : kPanel;
      for_each_vector(lanes, [&](int64_t i, auto get, auto put) {
        put(y + row * w.rows + n + i, bias ? get(sums + i) + get(bias + n + i) : get(sums + i));
      });
    });
  });
}

Status quantized_linear(const QuantizedLinear& a) {
  a.dtype == DType::f32 ? run<float>(a) : run<bf16>(a);
  return Status::ok;
}

FINETUNE_REGISTER(QuantizedLinear, quantized_linear);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
