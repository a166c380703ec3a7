// The end of an adaLN-Zero branch (Peebles & Xie 2023, arXiv:2212.09748): y = x + gate · branch, with a gate an item.
// Backward:   dbranch = gate · dy,   dgate = Σ_rows dy · branch over the rows of an item;   dx is dy.
//
// Memory: forward and backward read two elements and write one; 2 and 3 FLOPs, so the roof is memory bandwidth. All
// arithmetic is fp32.
#include "finetune/gate_residual.h"

#include "item_blocks.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

template <class T>
void forward(const GateResidual& a) {
  for_each_item_block(a.items, a.rows, a.dim, [&](int64_t item, int64_t, int64_t begin, int64_t end) {
    const T* gate = static_cast<const T*>(a.gate) + item * a.gate_stride;
    for (int64_t row = begin; row < end; ++row) {
      const T *x = static_cast<const T*>(a.x) + row * a.dim, *branch = static_cast<const T*>(a.branch) + row * a.dim;
      T* y = static_cast<T*>(a.y) + row * a.dim;
      for_each_vector(a.dim,
                      [&](int64_t i, auto get, auto put) { put(y + i, get(x + i) + get(gate + i) * get(branch + i)); });
    }
  });
}

template <class T>
void backward(const GateResidualBackward& a) {
  for_each_item_block(a.items, a.rows, a.dim, [&](int64_t item, int64_t block, int64_t begin, int64_t end) {
    const T* gate = static_cast<const T*>(a.gate) + item * a.gate_stride;
    float* dgate = a.partial + (block * a.items + item) * a.dim;
    std::memset(dgate, 0, a.dim * sizeof(float));
    for (int64_t row = begin; row < end; ++row) {
      const T *dy = static_cast<const T*>(a.dy) + row * a.dim, *branch = static_cast<const T*>(a.branch) + row * a.dim;
      T* dbranch = static_cast<T*>(a.dbranch) + row * a.dim;
      for_each_vector(a.dim, [&](int64_t i, auto get, auto put) {
        const vf d = get(dy + i);
        put(dbranch + i, d * get(gate + i));
        put(dgate + i, get(dgate + i) + d * get(branch + i));
      });
    }
  });
  sum_item_blocks(a.items, a.rows, a.dim, a.partial, static_cast<T*>(a.dgate));
}

Status gate_residual(const GateResidual& a) {
  a.dtype == DType::f32 ? forward<float>(a) : forward<bf16>(a);
  return Status::ok;
}

Status gate_residual_backward(const GateResidualBackward& a) {
  a.dtype == DType::f32 ? backward<float>(a) : backward<bf16>(a);
  return Status::ok;
}

FINETUNE_REGISTER(GateResidual, gate_residual);
FINETUNE_REGISTER(GateResidualBackward, gate_residual_backward);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
