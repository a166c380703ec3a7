#include "finetune/kv_cache.h"

#include <algorithm>

#include "kv_pool.h"

namespace finetune {
namespace {

constexpr const char* kName = "kv_cache";

Tensor unit_stride(const Tensor& t) {
  check(t.dim() == 3, kName, "k and v are (tokens, kv_heads, dim)");
  return t.size(2) == 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t);
}

void append(const Tensor& k_, const Tensor& v_, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots_,
            const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const Tensor k = unit_stride(k_), v = unit_stride(v_), slots = torch::stable::contiguous(slots_);
  check(k_cache.dim() == 4 && v_cache.dim() == 4, kName, "a cache is (blocks, block_size, kv_heads, dim)");
  for (int i = 0; i < 3; ++i) check(k.size(i) == v.size(i), kName, "k and v need one shape");
  for (int i = 0; i < 4; ++i) check(k_cache.size(i) == v_cache.size(i), kName, "the caches need one shape");
  check(k.size(1) == k_cache.size(2) && k.size(2) == k_cache.size(3), kName, "k's heads and dim must be the cache's");
  check(k.scalar_type() == v.scalar_type() && k_cache.scalar_type() == v_cache.scalar_type(), kName,
        "k and v need one dtype, and so do the caches");
  const Stored stored = stored_as(k_cache);
  check(stored != Stored::same || k.scalar_type() == k_cache.scalar_type(), kName,
        "the caches have the dtype of k and v, or 8 bits");
  check(slots.dim() == 1 && slots.size(0) == k.size(0) && slots.scalar_type() == ScalarType::Long, kName,
        "slots is (tokens,) int64");
  const int64_t blocks = k_cache.size(0), block_size = k_cache.size(1);
  if (!on_device(k)) {
    const auto* slot = static_cast<const int64_t*>(slots.const_data_ptr());
    check(std::all_of(slot, slot + slots.numel(), [&](int64_t s) { return s < blocks * block_size; }), kName,
          "a slot lies behind the end of the cache");
  }
  if (!k.numel()) return;
  run(kName, k,
      KvAppend{dtype_of(k), stored, in(k), in(v), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
               pool_of(kName, k_cache, k_scale, true), pool_of(kName, v_cache, v_scale, true), in<int64_t>(slots),
               k.size(0), k.size(1), k.size(2), blocks, block_size});
}

Tensor gather(const Tensor& cache, const Tensor& table_, const Tensor& lengths_, const OptionalTensor& scale,
              ScalarType dtype) {
  const Tensor table = torch::stable::contiguous(table_), lengths = torch::stable::contiguous(lengths_);
  const KvPool pool = pool_of(kName, cache, scale, false);
  check_table(kName, cache, table, lengths);
  check(stored_as(cache) != Stored::same || dtype == cache.scalar_type(), kName,
        "the result of a cache without scales has its dtype");
  Tensor out = torch::stable::new_empty(
      cache, {table.size(0), table.size(1) * cache.size(1), cache.size(2), cache.size(3)}, dtype);
  const KvGather args{dtype_of(out),        stored_as(cache),   pool,          in<int32_t>(table),
                      in<int32_t>(lengths), finetune::out(out), table.size(0), table.size(1),
                      cache.size(1),        cache.size(2),      cache.size(3)};
  if (out.numel()) run(kName, cache, args);
  return out;
}

void copy(const std::vector<Tensor>& caches, const Tensor& pairs_) {
  const Tensor pairs = torch::stable::contiguous(pairs_);
  check(pairs.dim() == 2 && pairs.size(1) == 2 && pairs.scalar_type() == ScalarType::Long, kName,
        "pairs is (n, 2) int64");
  for (const Tensor& cache : caches) {
    check(cache.dim() >= 1 && adjacent(cache, 1), kName, "the blocks of a cache must be contiguous");
    if (on_device(cache)) continue;
    const auto* id = static_cast<const int64_t*>(pairs.const_data_ptr());
    check(std::all_of(id, id + pairs.numel(), [&](int64_t i) { return i >= 0 && i < cache.size(0); }), kName,
          "a pair names a block outside of the cache");
  }
  for (size_t first = 0; first < caches.size() && pairs.numel(); first += KvCopy::most) {
    KvCopy args{};
    args.pools = static_cast<int>(std::min<size_t>(KvCopy::most, caches.size() - first));
    args.pairs = in<int64_t>(pairs);
    args.count = pairs.size(0);
    for (int i = 0; i < args.pools; ++i) {
      const Tensor& cache = caches[first + i];
      args.data[i] = static_cast<char*>(inout(cache));
      args.stride[i] = cache.stride(0) * cache.element_size();
      args.bytes[i] = cache.size(0) ? cache.numel() / cache.size(0) * cache.element_size() : 0;
    }
    run(kName, caches[first], args);
  }
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "kv_cache_(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor(c!)? k_scale, "
      "Tensor(d!)? v_scale) -> ()");
  m.def("kv_cache_gather(Tensor cache, Tensor table, Tensor lengths, Tensor? scale, ScalarType dtype) -> Tensor");
  m.def("kv_cache_copy_(Tensor(a!)[] caches, Tensor pairs) -> ()");
}
FINETUNE_KERNELS(m) {
  FINETUNE_KERNEL(m, "kv_cache_", append);
  FINETUNE_KERNEL(m, "kv_cache_gather", gather);
  FINETUNE_KERNEL(m, "kv_cache_copy_", copy);
}

}  // namespace finetune
