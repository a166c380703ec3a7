// The pools and block tables that kv_cache and paged_attention share, checked.
#pragma once

#include "common.h"
#include "finetune/kv_cache.h"

namespace finetune {

using OptionalTensor = std::optional<Tensor>;

inline Stored stored_as(const Tensor& cache) {
  return cache.scalar_type() == ScalarType::Char   ? Stored::int8
         : cache.scalar_type() == ScalarType::Byte ? Stored::fp8
                                                   : Stored::same;
}

// Are the dimensions from `first` on adjacent?
inline bool adjacent(const Tensor& t, int64_t first) {
  int64_t next = 1;
  for (int64_t i = t.dim() - 1; i >= first; --i) {
    if (t.size(i) != 1 && t.stride(i) != next) return false;
    next *= t.size(i);
  }
  return true;
}

// A cache (blocks, block_size, kv_heads, dim) and its scales as a kernel's argument: read, or also written.
inline KvPool pool_of(const char* op, const Tensor& cache, const OptionalTensor& scale, bool written) {
  check(cache.dim() == 4 && adjacent(cache, 1), op,
        "a cache is (blocks, block_size, kv_heads, dim), contiguous blocks");
  check(scale.has_value() == (stored_as(cache) != Stored::same), op, "a cache of 8 bits has scales, another has none");
  KvPool pool{written ? inout(cache) : const_cast<void*>(in(cache)), nullptr, cache.stride(0), 0};
  if (scale) {
    check(scale->dim() == 3 && adjacent(*scale, 1) && scale->scalar_type() == ScalarType::Float, op,
          "scales are float32 (blocks, block_size, kv_heads), contiguous blocks");
    for (int i = 0; i < 3; ++i) check(scale->size(i) == cache.size(i), op, "scales have the cache's sizes");
    pool.scale = static_cast<float*>(written ? inout(*scale) : const_cast<void*>(in(*scale)));
    pool.scale_block = scale->stride(0);
  }
  return pool;
}

// A block table (batch, width) and lengths (batch,), int32 and contiguous. On the CPU the blocks that will be read are
// looked at: outside of the pool there is other memory. A GPU would have to be waited for.
inline void check_table(const char* op, const Tensor& cache, const Tensor& table, const Tensor& lengths) {
  check(table.dim() == 2 && lengths.dim() == 1 && lengths.size(0) == table.size(0), op,
        "table is (batch, max_blocks), lengths (batch,)");
  check(table.scalar_type() == ScalarType::Int && lengths.scalar_type() == ScalarType::Int, op,
        "table and lengths are int32");
  if (on_device(cache)) return;
  const int64_t width = table.size(1), block_size = cache.size(1);
  const auto* ids = static_cast<const int32_t*>(table.const_data_ptr());
  const auto* ends = static_cast<const int32_t*>(lengths.const_data_ptr());
  for (int64_t b = 0; b < table.size(0); ++b) {
    for (int64_t i = 0; i < width && i * block_size < ends[b]; ++i) {
      check(ids[b * width + i] >= 0 && ids[b * width + i] < cache.size(0), op,
            "the table names a block outside of the cache");
    }
  }
}

}  // namespace finetune
