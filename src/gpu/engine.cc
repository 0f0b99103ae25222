#include "gpu/engine.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <numbers>
#include <string>

#include "core/domain.h"
#include "gpu/args.h"
#include "gpu/kernels.h"
#include "gpu/launch.h"
#include "gpu/plain_args.h"
#include "gpu/spec.h"
#include "jit/device.h"
#include "vicus/error.h"

namespace vicus::gpu {
namespace {

Bias bias_of(const Problem& p, const AttentionInputs& in) {
  if (p.rpb) return relative_bias_of(in.rpb, p.rank());
  Bias bias;
  if (p.attn_bias) {
    bias.data = const_cast<void*>(in.attn_bias.data());
    bias.batch = in.attn_bias.size(0) == 1 ? 0 : in.attn_bias.stride(0);
    bias.head = in.attn_bias.size(1) == 1 ? 0 : in.attn_bias.stride(1);
    bias.axis[1] = in.attn_bias.stride(2);
    bias.axis[2] = in.attn_bias.stride(3);
  }
  return bias;
}

DType bias_type_of(const Problem& p, const AttentionInputs& in) {
  return p.rpb ? in.rpb.dtype() : p.attn_bias ? in.attn_bias.dtype() : DType::float32;
}

void fill(ForwardArgs& args, const Problem& p, const AttentionInputs& in) {
  const int rank = p.rank();
  args.query = rows_of(in.query, rank);
  args.key = rows_of(in.key, rank);
  args.value = rows_of(in.value, rank);
  args.additional_keys = rows_of(in.additional_keys, 1);
  args.additional_values = rows_of(in.additional_values, 1);
  args.bias = bias_of(p, in);
  args.heads = static_cast<int>(p.heads);
  args.heads_kv = static_cast<int>(p.heads_kv);
  args.keys = static_cast<int>(p.dense() ? p.keys() : 0);
  args.additional = static_cast<int>(p.additional_tokens);
  args.scale_log2 = static_cast<float>(p.effective_scale() * std::numbers::log2e);
  const auto* mask = std::get_if<Neighborhood>(&p.mask);
  for (int i = 0; i < rank; ++i) {
    const int a = 3 - rank + i;
    args.len[a] = static_cast<int>(p.layout[i]);
    args.work.classes[a] =
        mask == nullptr ? 1 : static_cast<int>(std::clamp<std::int64_t>(p.layout[i], 1, mask->dilation[i]));
  }
}

std::int64_t cells_of(const ForwardArgs& args, std::int64_t batch) {
  for (const int n : args.work.classes) batch *= n;
  return batch;
}

// Tiles of the largest cell, of `extent`; `lens` are tokens. Returns how many.
std::int64_t cut(Work& work, const int (&lens)[3], const std::array<int, 3>& extent) {
  std::int64_t tiles = 1;
  for (std::size_t a = 0; a < 3; ++a) {
    work.tiles[a] = geometry::ceil_div(geometry::class_len(lens[a], work.classes[a], 0), extent[a]);
    tiles *= work.tiles[a];
  }
  return tiles;
}

int head_blocks(const ForwardArgs& args, const Spec& spec) {
  return args.heads_kv * geometry::ceil_div(args.heads / args.heads_kv, spec.tile_heads);
}

// A contiguous tensor [B, *X, H, width].
Rows scratch_rows(const Problem& p, void* data, std::int64_t width) {
  Rows rows;
  rows.data = data;
  rows.head = width;
  std::int64_t step = p.heads * width;
  for (int i = p.rank() - 1; i >= 0; --i) {
    rows.token[3 - p.rank() + i] = step;
    step *= p.layout[i];
  }
  rows.batch = step;
  return rows;
}

std::int64_t tiles_of(const Problem& p, ForwardArgs& args, const Spec& spec) {
  args.work.head_blocks = head_blocks(args, spec);
  return cut(args.work, args.len, spec.tile_q) * args.work.head_blocks * cells_of(args, p.batch);
}

// Tiles of keys; `work` has the residue classes.
std::int64_t key_tiles_of(const Problem& p, const ForwardArgs& args, Work& work, const Spec& spec) {
  const int dense_keys[3] = {1, 1, args.keys};
  work.head_blocks = args.heads_kv;
  return cut(work, p.dense() ? dense_keys : args.len, spec.tile_kv) * args.heads_kv * cells_of(args, p.batch);
}

void fill(ForwardArgs& args, const Problem& p, const AttentionInputs& in, const AttentionGradInputs& grads) {
  fill(args, p, in);
  args.output = rows_of(grads.output, p.rank());
  args.logsumexp = rows_of(grads.logsumexp, p.rank());
}

// Gradients in either kind of arguments.
template <class Args>
void fill(Args& args, const Problem& p, const AttentionGradInputs& grads, const AttentionGradients& out) {
  const int rank = p.rank();
  args.grad_output = rows_of(grads.grad_output, rank);
  args.grad_logsumexp = rows_of(grads.grad_logsumexp, rank);
  args.grad_query = rows_of(out.query, rank);
  args.grad_key = rows_of(out.key, rank);
  args.grad_value = rows_of(out.value, rank);
  args.grad_additional_keys = rows_of(out.additional_keys, 1);
  args.grad_additional_values = rows_of(out.additional_values, 1);
  args.grad_bias = relative_bias_of(out.rpb, rank);
  args.batch = static_cast<int>(p.batch);
}

std::int64_t blocks_for(std::int64_t work, std::int64_t of_a_block) { return (work + of_a_block - 1) / of_a_block; }

constexpr int kDeltaLanes = 8;  // of a row, in the kernels for delta

// The grid of one backward kernel; sets the work that they share.
Grid grid_of(const Spec& s, BackwardArgs& args, const Problem& p, const TensorView& grad_bias) {
  const std::int64_t rows = p.batch * p.queries() * p.heads;
  switch (s.kernel) {
    case Kernel::delta:
      return blocks_for(rows, s.threads() / kDeltaLanes);
    case Kernel::queries:
      return tiles_of(p, args, s);
    case Kernel::keys:
      return key_tiles_of(p, args, args.work, s);
    case Kernel::additional:
      args.work.head_blocks = args.heads_kv;
      args.work.tiles[0] = args.work.tiles[1] = 1;
      args.work.tiles[2] = geometry::ceil_div(args.additional, s.keys());
      return args.work.tiles[2] * p.heads_kv * p.batch;
    case Kernel::convert:
      return blocks_for(rows * padded(p.head_dim) / 2, s.threads());
    case Kernel::bias:
      return grad_bias.numel();
    default:
      return 0;
  }
}

Grid grid_of(const Spec& s, PlainBackwardArgs& args, const Problem& p, const TensorView& grad_bias) {
  const std::int64_t rows = p.queries() * p.heads;  // of a batch entry
  const auto slices = [&](std::int64_t width) { return geometry::ceil_div(static_cast<int>(width), s.wide); };
  switch (s.kernel) {
    case Kernel::plain_delta:
      require_countable("queries times heads", rows);
      return {blocks_for(rows, s.threads() / kDeltaLanes), std::min(p.batch, kMostGridY)};
    case Kernel::plain_queries:
      return {tiles_of(p, args.forward, s), slices(p.head_dim)};
    case Kernel::plain_keys:
      return {key_tiles_of(p, args.forward, args.key_work, s), slices(std::max(p.head_dim, p.head_dim_v))};
    case Kernel::plain_additional:
      return {blocks_for(args.forward.additional, s.keys()) * p.heads_kv * p.batch,
              slices(std::max(p.head_dim, p.head_dim_v))};
    case Kernel::plain_bias:
      return grad_bias.numel();
    default:
      return 0;
  }
}

void backward_plain(const Loaded& kernels, const Plan& plan, const AttentionInputs& in,
                    const AttentionGradInputs& grads, const AttentionGradients& out, void* stream) {
  const Problem& p = plan.problem;
  PlainBackwardArgs args;
  fill(args.forward, p, in, grads);
  fill(args, p, grads, out);
  args.scale = p.effective_scale();
  args.scale_log2 = args.scale * std::numbers::log2e;
  args.key_work = args.forward.work;
  args.cells = static_cast<int>(cells_of(args.forward, p.batch));
  const Scratch scratch(plan.gpu.backward_scratch_bytes, stream);
  args.delta = scratch_rows(p, scratch.data(), 1);
  for (const Spec& spec : kernels.specs()) {
    const Grid grid = grid_of(spec, args, p, out.rpb);
    kernels.launch(spec, grid, args);
  }
}

void backward_tensor_cores(const Loaded& kernels, const Plan& plan, const AttentionInputs& in,
                           const AttentionGradInputs& grads, const AttentionGradients& out, void* stream) {
  const Problem& p = plan.problem;
  BackwardArgs args;
  fill(args, p, in, grads);
  fill(args, p, grads, out);
  args.sequences = args.batch;
  constexpr std::int64_t kStatistics = 2;
  Scratch scratch(plan.gpu.backward_scratch_bytes, stream);
  args.statistics = scratch_rows(p, scratch.data(), kStatistics);
  if (plan.gpu.add_queries) {
    const std::int64_t rows = p.batch * p.queries() * p.heads;
    args.query_sums = scratch_rows(p, static_cast<float*>(scratch.data()) + rows * kStatistics, padded(p.head_dim));
    scratch.clear(plan.gpu.backward_scratch_bytes);
  }
  for (const Spec& spec : kernels.specs()) {
    const Grid grid = grid_of(spec, args, p, out.rpb);
    kernels.launch(spec, grid, args);
  }
}

}  // namespace

void forward(const Plan& plan, const AttentionInputs& in, const TensorView& output, const TensorView& logsumexp,
             void* stream) {
  const Problem& p = plan.problem;
  if (p.batch == 0 || p.queries() == 0) return;
  const jit::ContextGuard context(jit::device_of(output.data()));
  const bool vectors = aligned({in.query, in.key, in.value, in.additional_keys, in.additional_values, output});
  const Loaded kernels(
      kernels_of(plan, Call{.logsumexp = logsumexp.present(), .vectors = vectors, .bias_type = bias_type_of(p, in)}),
      stream);
  const Spec& spec = *kernels.specs().begin();
  PlainForwardArgs args;
  fill(args.forward, p, in);
  args.scale_log2 = p.effective_scale() * std::numbers::log2e;
  args.forward.output = rows_of(output, p.rank());
  args.forward.logsumexp = rows_of(logsumexp, p.rank());
  const std::int64_t blocks = tiles_of(p, args.forward, spec);
  if (spec.kernel == Kernel::plain_forward) {
    kernels.launch(spec, {blocks, geometry::ceil_div(spec.head_dim_v, spec.wide)}, args);
  } else {
    kernels.launch(spec, blocks, args.forward);
  }
}

void backward(const Plan& plan, const AttentionInputs& in, const AttentionGradInputs& grads,
              const AttentionGradients& out, void* stream) {
  const Problem& p = plan.problem;
  if (p.batch == 0) return;
  const jit::ContextGuard context(jit::device_of(in.query.data()));
  const bool vectors =
      aligned({in.query, in.key, in.value, in.additional_keys, in.additional_values, grads.output, grads.grad_output,
               out.query, out.key, out.value, out.additional_keys, out.additional_values});
  const Loaded kernels(kernels_of(plan, Call{.backward = true,
                                             .vectors = vectors,
                                             .bias_type = bias_type_of(p, in),
                                             .grad_query = out.query.present(),
                                             .grad_keys = out.key || out.value,
                                             .grad_additional = out.additional_keys || out.additional_values,
                                             .grad_bias = out.rpb.present()}),
                       stream);
  const bool plain = plan.gpu.backward_keys.family == GpuKernels::plain;
  (plain ? backward_plain : backward_tensor_cores)(kernels, plan, in, grads, out, stream);
}

void prepare(const Plan& plan, const CallSet& calls, int device) {
  const jit::Device& here = jit::device(device < 0 ? jit::thread_device() : device);
  const jit::Arch planned{plan.gpu.device.major, plan.gpu.device.minor};
  if (planned != here.arch) {
    throw InvalidArgument("device", std::to_string(here.ordinal) + " (" + here.name + ", " + name_of(here.arch) + ")",
                          "one of " + name_of(planned) + ", which the plan is for");
  }
  const jit::ContextGuard context(here.ordinal);
  for (const Spec& spec : kernels_of(plan, calls)) kernel_cache().load(spec, source_of);
}

}  // namespace vicus::gpu
