// Attention of a few queries over a paged cache: all tasks of csrc/cpu/paged_attention.h, then their pieces joined.
#include "paged_attention.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

template <class T, class C>
void run(const PagedAttention& a) {
  const int64_t scratch = paged_attention_scratch(a.queries * (a.heads / a.kv_heads), a.dim) / 16 * 16;
  each_task(a.workers, a.batch * a.kv_heads * a.pieces, [&](int64_t worker, int64_t task) {
    attend<T, C>(a, task / (a.kv_heads * a.pieces), task / a.pieces % a.kv_heads, task % a.pieces,
                 a.scratch + worker * scratch);
  });
  if (a.pieces == 1) return;
  each_task(a.workers, a.batch * a.queries * a.heads,
            [&](int64_t worker, int64_t row) { join<T>(a, row, a.scratch + worker * scratch); });
}

template <class T>
void run_stored(const PagedAttention& a) {
  a.stored == Stored::same ? run<T, T>(a) : a.stored == Stored::int8 ? run<T, i8>(a) : run<T, fp8>(a);
}

Status paged_attention(const PagedAttention& a) {
  a.dtype == DType::f32 ? run_stored<float>(a) : run_stored<bf16>(a);
  return Status::ok;
}

FINETUNE_REGISTER(PagedAttention, paged_attention);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
