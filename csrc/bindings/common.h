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

}  // namespace finetune
