#include "finetune/paged_attention.h"

#include <algorithm>
#include <cmath>

#include "kv_pool.h"

namespace finetune {
namespace {

constexpr const char* kName = "paged_attention";

std::tuple<Tensor, Tensor> paged_attention(const Tensor& q_, const Tensor& k_cache, const Tensor& v_cache,
                                           const Tensor& table_, const Tensor& lengths_, const OptionalTensor& k_scale,
                                           const OptionalTensor& v_scale, double scale, int64_t window,
                                           double softcap) {
  check(q_.dim() == 4 && k_cache.dim() == 4 && v_cache.dim() == 4, kName,
        "q is (batch, queries, heads, dim), a cache (blocks, block_size, kv_heads, dim)");
  const Tensor q = q_.size(3) == 1 || q_.stride(3) == 1 ? q_ : torch::stable::contiguous(q_),
               table = torch::stable::contiguous(table_), lengths = torch::stable::contiguous(lengths_);
  for (int i = 0; i < 4; ++i) check(k_cache.size(i) == v_cache.size(i), kName, "the caches need one shape");
  check(k_cache.scalar_type() == v_cache.scalar_type(), kName, "the caches need one dtype");
  const Stored stored = stored_as(k_cache);
  check(stored != Stored::same || q.scalar_type() == k_cache.scalar_type(), kName,
        "the caches have q's dtype, or 8 bits");
  check(k_cache.size(2) > 0 && q.size(2) % k_cache.size(2) == 0 && q.size(3) == k_cache.size(3), kName,
        "q's heads must be a multiple of the cache's, and dim its dim");
  check_table(kName, k_cache, table, lengths);
  check(q.size(3) > 0, kName, "heads need at least one element");
  check(window >= 0 && softcap >= 0 && softcap < INFINITY, kName, "window and softcap are 0 or positive");
  check(table.size(0) == q.size(0), kName, "table is (batch, max_blocks)");
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), dim = q.size(3);
  int64_t longest = table.size(1) * k_cache.size(1);
  if (!on_device(q)) {  // the table may be much wider than what it holds
    const auto* n = static_cast<const int32_t*>(lengths.const_data_ptr());
    longest = std::min<int64_t>(longest, batch ? *std::max_element(n, n + batch) : 0);
  }
  const int64_t pieces = std::max<int64_t>(1, (longest + PagedAttention::piece - 1) / PagedAttention::piece);
  const int64_t parts = pieces > 1 ? batch * queries * heads * pieces : 0;
  Tensor result = torch::stable::new_empty(q, {batch, queries, heads, dim}),
         lse = empty_f32(q, {batch, queries, heads});
  Tensor sums = empty_f32(q, {parts, dim}), tops = empty_f32(q, {parts, 2});
  if (!result.numel()) return {result, lse};
  const int64_t workers = on_device(q) ? 0 : threads();
  Tensor scratch = empty_f32(q, {workers, paged_attention_scratch(queries * (heads / k_cache.size(2)), dim)});
  const PagedAttention args{dtype_of(q),
                            stored,
                            in(q),
                            q.stride(0),
                            q.stride(1),
                            q.stride(2),
                            pool_of(kName, k_cache, k_scale, false),
                            pool_of(kName, v_cache, v_scale, false),
                            in<int32_t>(table),
                            in<int32_t>(lengths),
                            out(result),
                            out<float>(lse),
                            out<float>(sums),
                            out<float>(tops),
                            batch,
                            queries,
                            heads,
                            k_cache.size(2),
                            dim,
                            k_cache.size(1),
                            table.size(1),
                            pieces,
                            static_cast<float>(scale),
                            window,
                            static_cast<float>(softcap),
                            scratch.mutable_data_ptr<float>(),
                            workers};
  run(kName, q, args);
  return {result, lse};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor table, Tensor lengths, Tensor? k_scale, "
      "Tensor? v_scale, float scale, int window, float softcap=0) -> (Tensor out, Tensor lse)");
}
FINETUNE_KERNELS(m) { FINETUNE_KERNEL(m, "paged_attention", paged_attention); }

}  // namespace finetune
