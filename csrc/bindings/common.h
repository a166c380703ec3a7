// What every binding needs of torch (its stable ABI: the library built here loads in later releases too).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "finetune/kernel.h"

namespace finetune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, "finetune: expected float32 or bfloat16");
  }
}

inline void check(bool holds, const char* op, const char* what) {
  STD_TORCH_CHECK(holds, "finetune::", op, ": ", what);
}

template <class Args>
void run(const char* op, const Args& args) {
  check(launch(args) == Status::ok, op, "the kernel does not support these arguments");
}

inline Tensor empty_f32(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
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
  const void* data() const { return tensor.const_data_ptr(); }

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

}  // namespace finetune
