#include "finetune/attention.h"

#include <atomic>
#include <cmath>

#include "common.h"
#include "finetune/attention_hopper.h"

namespace finetune {
namespace {

constexpr const char* kName = "attention";
using OptionalTensor = std::optional<Tensor>;

Tensor unit_stride(const Tensor& t) {
  return t.dim() == 4 && (t.size(3) == 1 || t.stride(3) == 1) ? t : torch::stable::contiguous(t);
}

AttentionView view(const Tensor& t, const void* data) {
  const auto stride = [&](int i) { return t.size(i) > 1 ? t.stride(i) : 0; };  // of one element it may be anything
  return {const_cast<void*>(data), stride(0), stride(1), stride(2)};
}
AttentionView read(const Tensor& t) { return view(t, in(t)); }
AttentionView written(const Tensor& t) { return view(t, out(t)); }

std::vector<int64_t> integers(const Tensor& t) {
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
        break;
    }
  }
  return out;
}

// The mask as rows of bytes.
Tensor rows_of(const Tensor& mask) {
  check(mask.dim() == 3 && mask.scalar_type() == ScalarType::Bool, kName, "mask must be bool, (batch or 1, Tq, Tk)");
  return mask.size(2) <= 1 || mask.stride(2) == 1 ? mask : torch::stable::contiguous(mask);
}

void check_integers(const Tensor& t) {
  check(t.dim() == 1, kName, "lengths and cu_seqlens are one-dimensional");
  check(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, kName,
        "lengths and cu_seqlens are int32 or int64");
}

// The checked problem: inputs with unit stride in the last dimension, lengths and offsets as int64.
struct Problem {
  Tensor q, k, v;
  OptionalTensor mask;
  std::vector<int64_t> lengths, offsets;
  AttentionShape shape{};

  Problem(const Tensor& q_, const Tensor& k_, const Tensor& v_, bool causal, double scale,
          const OptionalTensor& lengths_, const OptionalTensor& cu_seqlens, int64_t window, double softcap,
          const OptionalTensor& mask_)
      : q(unit_stride(q_)), k(unit_stride(k_)), v(unit_stride(v_)) {
    check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, kName, "q, k and v must be (batch, tokens, heads, dim)");
    bool same = q.size(0) == k.size(0) && q.size(3) == k.size(3);
    for (int i = 0; i < 4; ++i) same = same && k.size(i) == v.size(i);
    check(same, kName, "k and v must have one shape, and q's batch and dim");
    check(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), kName, "q, k, v need one dtype");
    check(k.size(2) > 0 && q.size(2) % k.size(2) == 0, kName, "q's heads must be a multiple of k's");
    check(window >= 0 && softcap >= 0 && softcap < INFINITY, kName, "window and softcap are 0 or positive");
    check(k.size(1) < INT32_MAX && q.size(1) < INT32_MAX, kName, "at most 2^31 - 2 tokens");
    static_cast<AttentionSizes&>(shape) = {dtype_of(q),
                                           q.size(0),
                                           q.size(1),
                                           k.size(1),
                                           q.size(2),
                                           k.size(2),
                                           q.size(3),
                                           static_cast<float>(scale),
                                           causal,
                                           window,
                                           static_cast<float>(softcap),
                                           {}};
    shape.workers = threads();
    if (mask_) {
      check(!cu_seqlens, kName, "mask excludes cu_seqlens");
      mask = rows_of(*mask_);
      check((mask->size(0) == 1 || mask->size(0) == shape.batch) && mask->size(1) == shape.queries &&
                mask->size(2) == shape.keys,
            kName, "mask must be bool, (batch or 1, Tq, Tk)");
      shape.mask = {static_cast<const unsigned char*>(in(*mask)), mask->size(0) > 1 ? mask->stride(0) : 0,
                    mask->stride(1)};
    }
    if (lengths_) {
      check_integers(*lengths_);
      check(lengths_->size(0) == shape.batch, kName, "lengths must be (batch,)");
      if (lengths_->is_cpu()) lengths = integers(*lengths_);
      shape.lengths = lengths.data();
    }
    if (cu_seqlens) {
      check_integers(*cu_seqlens);
      check(!lengths_, kName, "lengths and cu_seqlens exclude each other");
      check(shape.batch == 1 && shape.queries == shape.keys, kName,
            "cu_seqlens needs batch 1 and as many queries as keys");
      check(cu_seqlens->size(0) > 0, kName, "cu_seqlens must not be empty");
      shape.documents = cu_seqlens->size(0) - 1;
      if (!cu_seqlens->is_cpu()) return;  // to look at them would mean to wait for the GPU; its kernels stay in bounds
      offsets = integers(*cu_seqlens);
      check(offsets.front() == 0 && offsets.back() == shape.keys, kName,
            "cu_seqlens must start at 0 and end at the number of tokens");
      for (size_t i = 1; i < offsets.size(); ++i)
        check(offsets[i - 1] <= offsets[i], kName, "cu_seqlens must not fall");
      shape.offsets = offsets.data();
    }
  }
  Problem(const Problem&) = delete;  // shape points into lengths and offsets
};

#if FINETUNE_DEVICE
// Lengths or offsets for the kernels on q's device; `kept` holds them alive.
Integers device_integers(const OptionalTensor& t, const Tensor& q, OptionalTensor& kept) {
  if (!t) return {};
  kept = torch::stable::contiguous(q.is_cuda() && t->is_cpu() ? torch::stable::to(*t, q.device()) : *t);
  return {in(*kept), kept->scalar_type() == ScalarType::Long};
}
#endif

#if FINETUNE_DEVICE
// The forward pass as the kernels take it, and where its results go.
struct ForwardOnDevice {
  Problem p;
  Tensor o, top, total;
  OptionalTensor kept[2];
  int64_t splits;
  Tensor split_rows, split_acc;  // m and l, and acc
  AttentionCuda args;

  ForwardOnDevice(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale,
                  const OptionalTensor& lengths, const OptionalTensor& cu_seqlens, int64_t window, double softcap,
                  const OptionalTensor& mask)
      : p(q, k, v, causal, scale, lengths, cu_seqlens, window, softcap, mask),
        o(torch::stable::new_empty(p.q, {p.shape.batch, p.shape.queries, p.shape.heads, p.shape.dim})),
        top(empty_f32(p.q, {p.shape.batch, p.shape.heads, p.shape.queries})),
        total(empty_f32(p.q, {p.shape.batch, p.shape.heads, p.shape.queries})),
        splits(attention_splits(p.shape, cu_seqlens.has_value())),
        split_rows(empty_f32(p.q, {2, splits > 1 ? splits * top.numel() : 0})),
        split_acc(empty_f32(p.q, {split_rows.numel() / 2, attention_tile_dim(p.shape.dim)})) {
    const AttentionCudaShape shape{p.shape, device_integers(lengths, p.q, kept[0]),
                                   device_integers(cu_seqlens, p.q, kept[1]), p.shape.documents};
    args = {shape,
            read(p.q),
            read(p.k),
            read(p.v),
            written(o),
            out<float>(top),
            out<float>(total),
            {splits, attention_span(p.shape), out<float>(split_rows), out<float>(split_rows) + split_rows.numel() / 2,
             out<float>(split_acc)}};
  }
};

std::tuple<Tensor, Tensor, Tensor> attention_hopper(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                                    double scale, const OptionalTensor& lengths,
                                                    const OptionalTensor& cu_seqlens, int64_t window, double softcap,
                                                    const OptionalTensor& mask) {
  ForwardOnDevice f(q, k, v, causal, scale, lengths, cu_seqlens, window, softcap, mask);
  run_device("attention_hopper", f.p.q, AttentionHopper{f.args});
  return {f.o, f.top, f.total};
}

std::atomic<bool> tensor_maps_refused = false;  // once is enough: it is the driver's answer

// Why the kernel for sm_90 does not run, or null.
const char* why_not(const ForwardOnDevice& f) {
  if (f.splits) return "few queries: their heads are packed and their keys split";
  if (tensor_maps_refused) return "the driver refuses its tensor maps (cuTensorMapEncodeTiled)";
#if !defined(FINETUNE_EMULATED)
  const torch::stable::accelerator::DeviceGuard guard(f.p.q.get_device_index());  // it asks the current GPU
#endif
  return why_not_hopper(f.args);
}

// Which kernel `attention` runs, and why not the other: "attention_hopper", or "attention: <reason>".
std::string attention_kernel(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale,
                             const OptionalTensor& lengths, const OptionalTensor& cu_seqlens, int64_t window,
                             double softcap, const OptionalTensor& mask) {
  ForwardOnDevice f(q, k, v, causal, scale, lengths, cu_seqlens, window, softcap, mask);
  const char* reason = why_not(f);
  return reason ? std::string("attention: ") + reason : "attention_hopper";
}
#endif

std::tuple<Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                             double scale, const OptionalTensor& lengths,
                                             const OptionalTensor& cu_seqlens, int64_t window, double softcap,
                                             const OptionalTensor& mask) {
#if FINETUNE_DEVICE
  if (on_device(q)) {
    ForwardOnDevice f(q, k, v, causal, scale, lengths, cu_seqlens, window, softcap, mask);
#if !defined(FINETUNE_EMULATED)  // there each has tests of its own
    if (!why_not(f)) {
      const Status status = launch_on(kName, f.p.q, AttentionHopper{f.args});
      if (status != Status::no_tensor_map) {
        check_status(status, kName);
        return {f.o, f.top, f.total};
      }
      tensor_maps_refused = true;
      aoti_torch_warn(__func__, __FILE__, __LINE__,
                      "attention: the driver refuses the tensor maps of the kernel for sm_90 (cuTensorMapEncodeTiled): "
                      "the kernel for every GPU runs in its place, which is slower");
    }
#endif
    run_device(kName, f.p.q, f.args);
    return {f.o, f.top, f.total};
  }
#endif
  Problem p(q, k, v, causal, scale, lengths, cu_seqlens, window, softcap, mask);
  const AttentionShape& s = p.shape;
  Tensor o = torch::stable::new_empty(p.q, {s.batch, s.queries, s.heads, s.dim});
  Tensor top = empty_f32(p.q, {s.batch, s.heads, s.queries}), total = empty_f32(p.q, {s.batch, s.heads, s.queries});
  Tensor scratch = empty_f32(p.q, {s.workers, attention_scratch(s.dim)});
  p.shape.scratch = scratch.mutable_data_ptr<float>();
  run(kName, Attention{p.shape, read(p.q), read(p.k), read(p.v), written(o), out<float>(top), out<float>(total)});
  return {o, top, total};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_o_, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& o, const Tensor& top_,
                                                      const Tensor& total_, bool causal, double scale,
                                                      const OptionalTensor& lengths, const OptionalTensor& cu_seqlens,
                                                      int64_t window, double softcap, const OptionalTensor& mask) {
  Problem p(q, k, v, causal, scale, lengths, cu_seqlens, window, softcap, mask);
  const AttentionShape& s = p.shape;
  const Tensor grad_o = unit_stride(grad_o_), output = unit_stride(o), top = torch::stable::contiguous(top_),
               total = torch::stable::contiguous(total_);
  for (const Tensor& t : {grad_o, output}) {
    for (int i = 0; i < 4; ++i) check(t.dim() == 4 && t.size(i) == p.q.size(i), kName, "grad_o and o have q's shape");
    check(t.scalar_type() == p.q.scalar_type(), kName, "grad_o and o have q's dtype");
  }
  for (const Tensor& t : {top, total}) {
    check(t.numel() == s.batch * s.heads * s.queries, kName, "top and total must be (batch, heads, queries)");
  }
  Tensor dq = torch::stable::new_empty(p.q, {s.batch, s.queries, s.heads, s.dim});
  Tensor dk = torch::stable::new_empty(p.k, {s.batch, s.keys, s.kv_heads, s.dim});
  Tensor dv = torch::stable::new_empty(p.v, {s.batch, s.keys, s.kv_heads, s.dim});
#if FINETUNE_DEVICE
  if (on_device(q)) {
    OptionalTensor kept[2];
    const AttentionCudaShape shape{s, device_integers(lengths, p.q, kept[0]), device_integers(cu_seqlens, p.q, kept[1]),
                                   s.documents};
    Tensor rows = empty_f32(p.q, {s.batch, s.heads, s.queries, sizeof(AttentionRow) / sizeof(float)});
    run_device(
        "attention_backward", p.q,
        AttentionBackwardCuda{shape, read(p.q), read(p.k), read(p.v), read(output), read(grad_o), written(dq),
                              written(dk), written(dv), in<float>(top), in<float>(total), out<AttentionRow>(rows)});
    return {dq, dk, dv};
  }
#endif
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
      AttentionBackward{p.shape, read(p.q), read(p.k), read(p.v), read(output), read(grad_o), written(dq), written(dk),
                        written(dv), in<float>(top), in<float>(total), longest, parts, out<float>(partial)});
  return {dq, dk, dv};
}

}  // namespace

FINETUNE_SCHEMAS(m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, bool causal, float scale, Tensor? lengths, Tensor? cu_seqlens, "
      "int window=0, float softcap=0.0, Tensor? mask=None) -> (Tensor o, Tensor top, Tensor total)");
#if FINETUNE_DEVICE
  m.def(
      "attention_hopper(Tensor q, Tensor k, Tensor v, bool causal, float scale, Tensor? lengths, Tensor? cu_seqlens, "
      "int window=0, float softcap=0.0, Tensor? mask=None) -> (Tensor o, Tensor top, Tensor total)");
  m.def(
      "attention_kernel(Tensor q, Tensor k, Tensor v, bool causal, float scale, Tensor? lengths, Tensor? cu_seqlens, "
      "int window=0, float softcap=0.0, Tensor? mask=None) -> str");
#endif
  m.def(
      "attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor top, Tensor total, bool "
      "causal, float scale, Tensor? lengths, Tensor? cu_seqlens, int window=0, float softcap=0.0, Tensor? mask=None) "
      "-> (Tensor dq, "
      "Tensor dk, Tensor dv)");
}
FINETUNE_KERNELS(m) {
  FINETUNE_KERNEL(m, "attention", attention, 5, 6);
  FINETUNE_KERNEL(m, "attention_backward", attention_backward, 9, 10);
#if FINETUNE_DEVICE
  FINETUNE_KERNEL(m, "attention_hopper", attention_hopper, 5, 6);
  FINETUNE_KERNEL(m, "attention_kernel", attention_kernel, 5, 6);
#endif
}

}  // namespace finetune
