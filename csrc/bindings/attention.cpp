#include "finetune/attention.h"

#include "common.h"

namespace finetune {
namespace {

constexpr const char* kName = "attention";
using OptionalTensor = std::optional<Tensor>;

Tensor unit_stride(const Tensor& t) {
  return t.dim() == 4 && (t.size(3) == 1 || t.stride(3) == 1) ? t : torch::stable::contiguous(t);
}

AttentionView view(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

std::vector<int64_t> integers(const Tensor& t) {
  check(t.dim() == 1 && t.is_cpu(), kName, "lengths and cu_seqlens are one-dimensional CPU tensors");
  std::vector<int64_t> out(t.size(0));
  for (int64_t i = 0; i < t.size(0); ++i) {
    const int64_t at = i * t.stride(0);
    switch (t.scalar_type()) {
      case ScalarType::Int:
        out[i] = t.const_data_ptr<int32_t>()[at];
        break;
      case ScalarType::Long:
        out[i] = t.const_data_ptr<int64_t>()[at];
        break;
      default:
        check(false, kName, "lengths and cu_seqlens are int32 or int64");
    }
  }
  return out;
}

// The checked problem: inputs with unit stride in the last dimension, lengths and offsets as int64.
struct Problem {
  Tensor q, k, v;
  std::vector<int64_t> lengths, offsets;
  AttentionShape shape{};

  Problem(const Tensor& q_, const Tensor& k_, const Tensor& v_, bool causal, double scale,
          const OptionalTensor& lengths_, const OptionalTensor& cu_seqlens)
      : q(unit_stride(q_)), k(unit_stride(k_)), v(unit_stride(v_)) {
    check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, kName, "q, k and v must be (batch, tokens, heads, dim)");
    bool same = q.size(0) == k.size(0) && q.size(3) == k.size(3);
    for (int i = 0; i < 4; ++i) same = same && k.size(i) == v.size(i);
    check(same, kName, "k and v must have one shape, and q's batch and dim");
    check(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), kName, "q, k, v need one dtype");
    check(k.size(2) > 0 && q.size(2) % k.size(2) == 0, kName, "q's heads must be a multiple of k's");
    check(k.size(1) < INT32_MAX && q.size(1) < INT32_MAX, kName, "at most 2^31 - 2 tokens");
    shape = {dtype_of(q), q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), static_cast<float>(scale),
             causal,      nullptr,   nullptr,   0,         nullptr,   threads()};
    if (lengths_) {
      lengths = integers(*lengths_);
      check(static_cast<int64_t>(lengths.size()) == shape.batch, kName, "lengths must be (batch,)");
      shape.lengths = lengths.data();
    }
    if (cu_seqlens) {
      check(!lengths_, kName, "lengths and cu_seqlens exclude each other");
      offsets = integers(*cu_seqlens);
      check(shape.batch == 1 && shape.queries == shape.keys, kName,
            "cu_seqlens needs batch 1 and as many queries as keys");
      check(!offsets.empty() && offsets.front() == 0 && offsets.back() == shape.keys, kName,
            "cu_seqlens must start at 0 and end at the number of tokens");
      for (size_t i = 1; i < offsets.size(); ++i)
        check(offsets[i - 1] <= offsets[i], kName, "cu_seqlens must not fall");
      shape.documents = static_cast<int64_t>(offsets.size()) - 1;
      shape.offsets = offsets.data();
    }
  }
  Problem(const Problem&) = delete;  // shape points into lengths and offsets
};

std::tuple<Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                             double scale, const OptionalTensor& lengths,
                                             const OptionalTensor& cu_seqlens) {
  Problem p(q, k, v, causal, scale, lengths, cu_seqlens);
  const AttentionShape& s = p.shape;
  Tensor o = torch::stable::new_empty(p.q, {s.batch, s.queries, s.heads, s.dim});
  Tensor top = empty_f32(p.q, {s.batch, s.heads, s.queries}), total = empty_f32(p.q, {s.batch, s.heads, s.queries});
  Tensor scratch = empty_f32(p.q, {s.workers, attention_scratch(s.dim)});
  p.shape.scratch = scratch.mutable_data_ptr<float>();
  run(kName, Attention{p.shape, view(p.q), view(p.k), view(p.v), view(o), top.mutable_data_ptr<float>(),
                       total.mutable_data_ptr<float>()});
  return {o, top, total};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_o_, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& o, const Tensor& top_,
                                                      const Tensor& total_, bool causal, double scale,
                                                      const OptionalTensor& lengths, const OptionalTensor& cu_seqlens) {
  Problem p(q, k, v, causal, scale, lengths, cu_seqlens);
  const AttentionShape& s = p.shape;
  const Tensor grad_o = unit_stride(grad_o_), out = unit_stride(o), top = torch::stable::contiguous(top_),
               total = torch::stable::contiguous(total_);
  for (const Tensor& t : {grad_o, out}) {
    for (int i = 0; i < 4; ++i) check(t.dim() == 4 && t.size(i) == p.q.size(i), kName, "grad_o and o have q's shape");
    check(t.scalar_type() == p.q.scalar_type(), kName, "grad_o and o have q's dtype");
  }
  for (const Tensor& t : {top, total}) {
    check(t.numel() == s.batch * s.heads * s.queries, kName, "top and total must be (batch, heads, queries)");
  }
  Tensor dq = torch::stable::new_empty(p.q, {s.batch, s.queries, s.heads, s.dim});
  Tensor dk = torch::stable::new_empty(p.k, {s.batch, s.keys, s.kv_heads, s.dim});
  Tensor dv = torch::stable::new_empty(p.v, {s.batch, s.keys, s.kv_heads, s.dim});
  int64_t longest = s.keys;
  if (s.offsets) {
    longest = 0;
    for (int64_t n = 0; n < s.documents; ++n) {
      const int64_t length = s.offsets[n + 1] - s.offsets[n];
      longest = length > longest ? length : longest;
    }
  }
  const int64_t rows = (s.offsets ? longest : s.queries) * (s.heads / s.kv_heads);
  const int64_t parts = attention_parts(s.sequences() * s.kv_heads, rows);
  Tensor scratch = empty_f32(p.q, {s.workers, attention_backward_scratch(s.dim, longest, parts)});
  Tensor partial = empty_f32(p.q, {attention_partial(parts, s.kv_heads, s.batch * s.keys, s.dim)});
  p.shape.scratch = scratch.mutable_data_ptr<float>();
  run("attention_backward",
      AttentionBackward{p.shape, view(p.q), view(p.k), view(p.v), view(out), view(grad_o), view(dq), view(dk), view(dv),
                        top.const_data_ptr<float>(), total.const_data_ptr<float>(), longest, parts,
                        partial.mutable_data_ptr<float>()});
  return {dq, dk, dv};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, bool causal, float scale, Tensor? lengths, Tensor? cu_seqlens) -> "
      "(Tensor "
      "o, Tensor top, Tensor total)");
  m.def(
      "attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor top, Tensor total, bool "
      "causal, float scale, "
      "Tensor? lengths, Tensor? cu_seqlens) -> (Tensor dq, Tensor dk, Tensor dv)");
}
FINETUNE_KERNELS(m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace finetune
