// The paged key–value cache: append (quantizing to int8 or e4m3 with a scale a token and head), gather, copy of blocks.
//
// Every token moves once: append reads k and v and writes the pool, gather reads the pool and writes the dense tensor,
// a copy reads and writes whole blocks. At most 3 FLOPs an element (a maximum, a division, a rounding): the roof is
// memory bandwidth.
#include "finetune/kv_cache.h"

#include "store_head.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

template <class T, class C>
void append_as(const KvAppend& a) {
  parallel_for(a.tokens, 1 + 16384 / (a.kv_heads * a.dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = a.slots[i], block = slot / a.block_size, offset = slot % a.block_size;
      if (slot < 0 || block >= a.blocks) continue;
      const auto one = [&](const void* from, int64_t token, int64_t head, const KvPool& to) {
        for (int64_t h = 0; h < a.kv_heads; ++h) {
          const int64_t at = offset * a.kv_heads + h;
          store_head(static_cast<const T*>(from) + i * token + h * head,
                     static_cast<C*>(to.data) + block * to.block + at * a.dim,
                     to.scale ? to.scale + block * to.scale_block + at : nullptr, a.dim);
        }
      };
      one(a.k, a.k_token, a.k_head, a.to_k);
      one(a.v, a.v_token, a.v_head, a.to_v);
    }
  });
}

template <class T, class C>
void gather_as(const KvGather& a) {
  const int64_t length = a.width * a.block_size, size = a.kv_heads * a.dim;
  parallel_for(a.batch * length, 1 + 16384 / (size + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / length, j = i % length;
      T* to = static_cast<T*>(a.out) + i * size;
      if (j >= a.lengths[b]) {
        std::memset(to, 0, size * sizeof(T));
        continue;
      }
      const int64_t block = a.table[b * a.width + j / a.block_size], offset = j % a.block_size;
      const C* from = static_cast<const C*>(a.from.data) + block * a.from.block + offset * size;
      if constexpr (std::is_same_v<T, C>) {
        std::memcpy(to, from, size * sizeof(T));
      } else {
        const float* scale = a.from.scale + block * a.from.scale_block + offset * a.kv_heads;
        for (int64_t h = 0; h < a.kv_heads; ++h) {
          for_each_vector(a.dim, [&](int64_t d, auto get, auto put) {
            put(to + h * a.dim + d, get(from + h * a.dim + d) * scale[h]);
          });
        }
      }
    }
  });
}

template <class F>
Status for_types(DType dtype, Stored stored, F&& f) {
  const auto with = [&](auto t) {
    stored == Stored::same ? f(t, t) : stored == Stored::int8 ? f(t, i8{}) : f(t, fp8{});
  };
  dtype == DType::f32 ? with(float{}) : with(bf16{});
  return Status::ok;
}

Status append(const KvAppend& a) {
  return for_types(a.dtype, a.stored, [&](auto t, auto c) { append_as<decltype(t), decltype(c)>(a); });
}

Status gather(const KvGather& a) {
  return for_types(a.dtype, a.stored, [&](auto t, auto c) { gather_as<decltype(t), decltype(c)>(a); });
}

Status copy(const KvCopy& a) {
  parallel_for(a.count * a.pools, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pool = i % a.pools, *pair = a.pairs + i / a.pools * 2;
      std::memcpy(a.data[pool] + pair[1] * a.stride[pool], a.data[pool] + pair[0] * a.stride[pool], a.bytes[pool]);
    }
  });
  return Status::ok;
}

FINETUNE_REGISTER(KvAppend, append);
FINETUNE_REGISTER(KvGather, gather);
FINETUNE_REGISTER(KvCopy, copy);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
