#include "gpu/engine.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>

#include "core/domain.h"
#include "gpu/args.h"
#include "gpu/spec.h"
#include "jit/device.h"
#include "jit/module.h"
#include "vicus/error.h"

namespace vicus::gpu {
namespace {

// Token axes of a tensor [B, *X, H, ...] trail in three.
Rows rows_of(const ConstTensorView& t, int rank) {
  Rows rows;
  if (!t) return rows;
  rows.data = const_cast<void*>(t.data());
  rows.batch = t.stride(0);
  rows.head = t.stride(1 + rank);
  for (int i = 0; i < rank; ++i) rows.token[3 - rank + i] = t.stride(1 + i);
  return rows;
}

// Rows of 16-bit elements start at multiples of 16 bytes.
bool aligned(const ConstTensorView& t) {
  if (!t) return true;
  constexpr std::int64_t kElements = 8;
  bool all = reinterpret_cast<std::uintptr_t>(t.data()) % 16 == 0 && t.size(t.dims() - 1) % kElements == 0;
  for (int i = 0; i + 1 < t.dims(); ++i) all = all && t.stride(i) % kElements == 0;
  return all;
}

Bias bias_of(const Problem& p, const AttentionInputs& in) {
  Bias bias;
  if (p.rpb) {
    bias.data = const_cast<void*>(in.rpb.data());
    bias.head = in.rpb.stride(0);
    for (int i = 0; i < p.rank(); ++i) bias.axis[3 - p.rank() + i] = in.rpb.stride(1 + i);
  } else if (p.attn_bias) {
    bias.data = const_cast<void*>(in.attn_bias.data());
    bias.batch = in.attn_bias.size(0) == 1 ? 0 : in.attn_bias.stride(0);
    bias.head = in.attn_bias.size(1) == 1 ? 0 : in.attn_bias.stride(1);
    bias.axis[1] = in.attn_bias.stride(2);
    bias.axis[2] = in.attn_bias.stride(3);
  }
  return bias;
}

jit::KernelCache<Spec>& forward_kernels() {
  static jit::KernelCache<Spec> cache;
  return cache;
}

}  // namespace

void forward(const Plan& plan, const AttentionInputs& in, const TensorView& output, const TensorView& logsumexp,
             void* stream) {
  const Problem& p = plan.problem;
  if (p.batch == 0 || p.queries() == 0) return;
  const jit::ContextGuard context(jit::device_of(output.data()));
  const bool vectors = aligned(in.query) && aligned(in.key) && aligned(in.value) && aligned(in.additional_keys) &&
                       aligned(in.additional_values) && aligned(output);
  const DType bias_type = p.rpb ? in.rpb.dtype() : p.attn_bias ? in.attn_bias.dtype() : DType::float32;
  const Spec spec = forward_spec(plan, logsumexp.present(), vectors, bias_type);
  const jit::Kernel& kernel = forward_kernels().get(spec, stream, [](const Spec& s) { return source_of(s); });

  ForwardArgs args;
  const int rank = p.rank();
  args.query = rows_of(in.query, rank);
  args.key = rows_of(in.key, rank);
  args.value = rows_of(in.value, rank);
  args.additional_keys = rows_of(in.additional_keys, 1);
  args.additional_values = rows_of(in.additional_values, 1);
  args.output = rows_of(output, rank);
  args.logsumexp = rows_of(logsumexp, rank);
  args.bias = bias_of(p, in);
  args.heads = static_cast<int>(p.heads);
  args.heads_kv = static_cast<int>(p.heads_kv);
  args.keys = static_cast<int>(p.dense() ? p.keys() : 0);
  args.additional = static_cast<int>(p.additional_tokens);
  args.scale_log2 = static_cast<float>(p.effective_scale() * std::numbers::log2e);
  std::int64_t cells = p.batch;
  std::int64_t blocks = 1;
  for (int i = 0; i < rank; ++i) {
    const int a = 3 - rank + i;
    const auto n = static_cast<std::size_t>(a);
    const int len = static_cast<int>(p.layout[i]);
    args.len[a] = len;
    args.work.classes[a] = std::min(spec.dilation[n], len);
    args.work.tiles[a] = geometry::ceil_div(geometry::class_len(len, args.work.classes[a], 0), spec.tile_q[n]);
    cells *= args.work.classes[a];
    blocks *= args.work.tiles[a];
  }
  args.work.head_blocks = args.heads_kv * geometry::ceil_div(args.heads / args.heads_kv, spec.tile_heads);
  blocks *= args.work.head_blocks * cells;
  if (blocks > std::numeric_limits<int>::max()) {
    throw Unsupported("engine sm80 launches at most 2147483647 blocks, the problem has " + std::to_string(blocks));
  }
  jit::launch(kernel, {.x = static_cast<unsigned>(blocks)}, spec.threads(), plan.gpu.forward.shared_bytes, stream,
              &args, sizeof(args));
}

}  // namespace vicus::gpu
