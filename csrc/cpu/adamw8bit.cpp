// AdamW with block-wise 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861), all tensors in one parallel loop.
// A block of 256 elements is widened, updated and measured in one sweep, its moments wait in L1 and are rounded to
// codes in a second: a binary search of eight steps among the middles between the map's values.
//
// Memory: reads p, g, two codes and writes p, two codes: 16 bytes a parameter in fp32 and 1/16 for the blocks' maxima,
// against 28 with fp32 moments. The look-ups (18 a parameter) are the work: on the CPU they are the roof, not memory.
// Compiled without contraction (CMakeLists.txt), so that the bits are those of the reference.
#include "finetune/adamw8bit.h"

#include "simd.h"

namespace finetune::FINETUNE_LEVEL {
namespace {

constexpr int kBlock = AdamW8bit::block;

FINETUNE_INLINE vf lookup(const float* table, vi at) {
#if defined(__AVX512F__)
  return (vf)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, (__m512i)at, table,
                                      4);  // gcc warns of the plain one
#elif defined(__AVX2__)
  return (vf)_mm256_i32gather_ps(table, (__m256i)at, 4);
#else
  vf out;
  for (int i = 0; i < kLanes; ++i) out[i] = table[at[i]];
  return out;
#endif
}

typedef uint8_t vb __attribute__((vector_size(kLanes)));

FINETUNE_INLINE vi load_codes(const uint8_t* p) {
  vb codes;
  std::memcpy(&codes, p, sizeof codes);
  return __builtin_convertvector(codes, vi);
}

// The number of middles below x: the nearest code (the lower of two as near).
FINETUNE_INLINE vi code_of(const float* middles, vf x) {
  vi code{};
#pragma GCC unroll 8
  for (int step = kBlock / 2; step; step /= 2) code -= (vi)(lookup(middles - 1, code + step) < x) & -step;
  return code;
}

void quantize(const float* x, float absmax, const float* middles, uint8_t* codes) {
  for (int i = 0; i < kBlock; i += kLanes) {
    const vf y = absmax > 0 ? load(x + i) / absmax : vf{};
    const vb code = __builtin_convertvector(code_of(middles, y), vb);
    std::memcpy(codes + i, &code, sizeof code);
  }
}

template <class P, class G>
void update_block(const AdamW8bit& a, P* param, const G* grad, float* master, uint8_t* m_codes, uint8_t* v_codes,
                  float* m_max, float* v_max, int64_t size) {
  alignas(64) float m[kBlock] = {}, v[kBlock] = {};
  uint8_t codes[2][kBlock] = {};  // all of a block's, also where the tensor ends within it
  std::memcpy(codes[0], m_codes, size);
  std::memcpy(codes[1], v_codes, size);
  const float m_scale = *m_max, v_scale = *v_max;
  vf m_top{}, v_top{};
  for_each_vector(size, [&](int64_t i, auto get, auto put) {
    const vf g = get(grad + i) * a.grad_scale;
    const vf m_old = lookup(a.maps, load_codes(codes[0] + i)) * m_scale;
    const vf v_old = lookup(a.maps + kBlock, load_codes(codes[1] + i)) * v_scale;
    const vf first = m_old * a.beta1 + g * a.one_minus_beta1;
    const vf second = v_old * a.beta2 + g * g * a.one_minus_beta2;
    const vf p = master ? get(master + i) : get(param + i);
    const vf next = p * a.decay - a.step_size * first / (vsqrt(second) * a.rsqrt_bc2 + a.eps);
    put(m + i, first);
    put(v + i, second);
    if (master) put(master + i, next);
    put(param + i, next);
  });
  for (int i = 0; i < kBlock; i += kLanes) {  // past the tensor's end both are zero
    m_top = vmax(m_top, (vf)((vi)load(m + i) & 0x7fffffff));
    v_top = vmax(v_top, load(v + i));
  }
  *m_max = max(m_top);
  *v_max = max(v_top);
  quantize(m, *m_max, a.middles, codes[0]);
  quantize(v, *v_max, a.middles + kBlock, codes[1]);
  std::memcpy(m_codes, codes[0], size);
  std::memcpy(v_codes, codes[1], size);
}

template <class P, class G>
void update(const AdamW8bit& a, const AdamW8bitPiece& piece) {
  for (int64_t at = 0; at < piece.size; at += kBlock) {
    const int64_t block = at / kBlock, rest = piece.size - at;
    update_block(a, static_cast<P*>(piece.param) + at, static_cast<const G*>(piece.grad) + at,
                 piece.master ? piece.master + at : nullptr, piece.exp_avg + at, piece.exp_avg_sq + at,
                 piece.exp_avg_max + block, piece.exp_avg_sq_max + block, rest < kBlock ? rest : kBlock);
  }
}

Status adamw8bit(const AdamW8bit& a) {
  parallel_for(a.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const AdamW8bitPiece& piece = a.pieces[at];
      const bool wide_grad = piece.grad_dtype == DType::f32;
      if (piece.param_dtype == DType::f32) {
        wide_grad ? update<float, float>(a, piece) : update<float, bf16>(a, piece);
      } else {
        wide_grad ? update<bf16, float>(a, piece) : update<bf16, bf16>(a, piece);
      }
    }
  });
  return Status::ok;
}

FINETUNE_REGISTER(AdamW8bit, adamw8bit);

}  // namespace
}  // namespace finetune::FINETUNE_LEVEL
