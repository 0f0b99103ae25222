#include "gpu/engine.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <numbers>
#include <string>
#include <type_traits>

#include "core/domain.h"
#include "gpu/args.h"
#include "gpu/kernels.h"
#include "gpu/launch.h"
#include "gpu/lists.h"
#include "gpu/order.h"
#include "gpu/plain_args.h"
#include "gpu/sm90_engine.h"
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

void fill(ForwardArgs& args, const Problem& p, const AttentionInputs& in, const Lists& lists) {
  lists.fill(args);
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

std::int64_t cells_of(const Problem& p, const ForwardArgs& args) {
  std::int64_t cells = sequences_of(p);
  for (const int n : args.work.classes) cells *= n;
  return cells;
}

// Tiles of the largest cell, of `extent`; `lens` are tokens. Returns how many.
std::int64_t cut(Work& work, const std::array<int, 3>& lens, const std::array<int, 3>& extent) {
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

// A contiguous tensor [B, *X, Hkv, width] of keys.
Rows key_scratch_rows(const Problem& p, void* data, std::int64_t width) {
  Rows rows;
  rows.data = data;
  std::int64_t step = p.heads_kv * width;
  for (int i = p.rank() - 1; i >= 0; --i) {
    rows.token[3 - p.rank() + i] = step;
    step *= p.dense() ? p.keys() : p.layout[i];
  }
  rows.head = width;
  rows.batch = step;
  return rows;
}

// A contiguous tensor [B, *X, H, width], or with `by_heads` [B, H, *X, width]: boxes of engine sm90.
Rows scratch_rows(const Problem& p, void* data, std::int64_t width, bool by_heads = false) {
  Rows rows;
  rows.data = data;
  std::int64_t step = by_heads ? width : p.heads * width;
  for (int i = p.rank() - 1; i >= 0; --i) {
    rows.token[3 - p.rank() + i] = step;
    step *= p.layout[i];
  }
  rows.head = by_heads ? step : width;
  rows.batch = by_heads ? p.heads * step : step;
  return rows;
}

// In scratch memory, where the plan has several parts.
KeyParts key_parts_of(const Plan& plan, void* scratch) {
  const Problem& p = plan.problem;
  KeyParts parts;
  parts.count = plan.gpu.forward.key_parts;
  if (parts.count == 1) return parts;
  parts.rows = p.batch * p.queries() * p.heads;
  parts.output = scratch_rows(p, scratch, p.head_dim_v);
  parts.logsumexp = scratch_rows(p, static_cast<float*>(scratch) + parts.count * parts.rows * p.head_dim_v, 1);
  return parts;
}

std::int64_t tiles_of(const Problem& p, ForwardArgs& args, const Spec& spec) {
  args.work.head_blocks = head_blocks(args, spec);
  return cut(args.work, longest_queries(p), spec.tile_q) * geometry::ceil_div(args.work.head_blocks, spec.turns) *
         cells_of(p, args);
}
std::int64_t ordered_tiles_of(const Problem& p, ForwardArgs& args, const Spec& spec, int turns = 1) {
  const std::int64_t tiles = tiles_of(p, args, spec);
  const int blocks = geometry::ceil_div(args.work.head_blocks, spec.turns);
  args.order = order_of(args, args.work, spec, blocks, tiles, turns);
  return tiles;
}

// Tiles of keys; `work` has the residue classes.
std::int64_t key_tiles_of(const Problem& p, const ForwardArgs& args, Work& work, const std::array<int, 3>& tile) {
  work.head_blocks = args.heads_kv;
  return cut(work, longest_keys(p), tile) * args.heads_kv * cells_of(p, args);
}
std::int64_t ordered_key_tiles_of(const Problem& p, const ForwardArgs& args, Work& work, TileOrder& order,
                                  const Spec& spec, int turns = 1) {
  const std::int64_t tiles = key_tiles_of(p, args, work, spec.tile_kv);
  order = order_of(args, work, spec, args.heads_kv, tiles, turns);
  return tiles;
}

// What a backward call is given, and what it fills.
struct Backward {
  const Plan& plan;
  const AttentionInputs& in;
  const AttentionGradInputs& grads;
  const AttentionGradients& out;
  const Lists& lists;
  void* stream;
  const GpuGradientPlan& gradients;  ///< what the kernels are of
};

void fill(ForwardArgs& args, const Backward& call) {
  const Problem& p = call.plan.problem;
  fill(args, p, call.in, call.lists);
  args.output = rows_of(call.grads.output, p.rank());
  args.logsumexp = rows_of(call.grads.logsumexp, p.rank());
}

// Gradients in either kind of arguments.
template <class Args>
void fill_gradients(Args& args, const Backward& call) {
  const auto& [plan, in, grads, out, lists, stream, gradients] = call;
  const int rank = plan.problem.rank();
  args.grad_output = rows_of(grads.grad_output, rank);
  args.grad_logsumexp = rows_of(grads.grad_logsumexp, rank);
  args.grad_query = rows_of(out.query, rank);
  args.grad_key = rows_of(out.key, rank);
  args.grad_value = rows_of(out.value, rank);
  args.grad_additional_keys = rows_of(out.additional_keys, 1);
  args.grad_additional_values = rows_of(out.additional_values, 1);
  args.grad_bias = relative_bias_of(out.rpb, rank);
  args.batch = static_cast<int>(plan.problem.batch);
}

std::int64_t blocks_for(std::int64_t work, std::int64_t of_a_block) { return (work + of_a_block - 1) / of_a_block; }

// Kernels of float64 read and write float64.
void require_type(const char* name, const ConstTensorView& logsumexp, DType dtype) {
  if (!logsumexp || dtype != DType::float64 || logsumexp.dtype() == DType::float64) return;
  throw Unsupported(std::string("engine sm80 takes a float64 ") + name + " of float64 attention, it is " +
                    std::string(dtype_name(logsumexp.dtype())));
}

// Of the kernel that fills what no sequence holds, whatever that is.
std::int64_t rest_blocks(const Plan& plan) { return 2 * std::max(plan.gpu.device.multiprocessors, 1); }

constexpr int kDeltaLanes = 8;  // of a row, in the kernels for delta

// The grid of one backward kernel; sets the work that they share.
Grid grid_of(const Spec& s, BackwardArgs& args, const Backward& call) {
  const Problem& p = call.plan.problem;
  const GpuGradientPlan& g = call.gradients;
  const std::int64_t rows = p.batch * p.queries() * p.heads;
  switch (s.kernel) {
    case Kernel::delta:
      return blocks_for(rows, s.threads() / kDeltaLanes);
    case Kernel::queries:
      return ordered_tiles_of(p, args, s, g.queries.heads_in_turns);
    case Kernel::keys: {
      const std::int64_t tiles = ordered_key_tiles_of(p, args, args.work, args.order, s, g.keys.heads_in_turns);
      args.order.at_once = call.plan.gpu.device.multiprocessors * s.min_blocks;
      return tiles;
    }
    case Kernel::sm90_queries:
      return tiles_of(p, args, s);
    case Kernel::sm90_keys:  // whose rows are keys
    case Kernel::sm90_values:
      return key_tiles_of(p, args, args.work, s.tile_q);
    case Kernel::additional:
      args.work.head_blocks = args.heads_kv;
      args.work.tiles[0] = args.work.tiles[1] = 1;
      args.work.tiles[2] = geometry::ceil_div(args.additional, s.keys());
      args.order = order_of(args, args.work, s, args.heads_kv, args.work.tiles[2] * p.heads_kv * p.batch, 1);
      return args.work.tiles[2] * p.heads_kv * p.batch;
    case Kernel::convert:
      return blocks_for(rows * padded(p.head_dim) / 4, s.threads());
    case Kernel::convert_keys:
      return blocks_for(args.key_rows, s.warps);
    case Kernel::bias:
      return call.out.rpb.numel();
    default:
      return 0;
  }
}

Grid grid_of(const Spec& s, PlainBackwardArgs& args, const Backward& call) {
  const Problem& p = call.plan.problem;
  const std::int64_t rows = p.queries() * p.heads;  // of a batch entry
  const auto slices = [&](std::int64_t width) { return geometry::ceil_div(static_cast<int>(width), s.wide); };
  switch (s.kernel) {
    case Kernel::plain_delta:
      require_countable("queries times heads", rows);
      return {blocks_for(rows, s.threads() / kDeltaLanes), std::min(p.batch, kMostGridY)};
    case Kernel::plain_queries:
      return {ordered_tiles_of(p, args.forward, s), slices(p.head_dim)};
    case Kernel::plain_keys:
      return {ordered_key_tiles_of(p, args.forward, args.key_work, args.key_order, s),
              slices(std::max(p.head_dim, p.head_dim_v))};
    case Kernel::plain_additional:
      return {blocks_for(args.forward.additional, s.keys()) * p.heads_kv * p.batch,
              slices(std::max(p.head_dim, p.head_dim_v))};
    case Kernel::plain_bias:
      return call.out.rpb.numel();
    default:
      return 0;
  }
}

// Queues the kernels of a backward call, which share `args`.
template <class Args>
void launch_all(Loaded& kernels, const Backward& call, Args& args, const ForwardArgs& forward) {
  const auto& [plan, in, grads, out, lists, stream, gradients] = call;
  for (const Spec& spec : kernels.specs()) {
    if (spec.kernel == Kernel::packed_rest) {
      const RestArgs rests = rests_of(plan.problem, forward, {{out.query, false}, {out.key, true}, {out.value, true}});
      kernels.launch(spec, rest_blocks(plan), rests);
      continue;
    }
    const Grid grid = grid_of(spec, args, call);
    if constexpr (std::is_same_v<Args, BackwardArgs>) {
      args.followed = kernels.followed(spec);
      if (loads_boxes(spec.kernel)) {
        launch_boxes(kernels, spec, plan, in, grads.grad_output, out, args, grid.x);
        continue;
      }
    }
    kernels.launch(spec, grid, args);
  }
}

/// Where the tensors are; those without elements are nowhere. -1: none has any.
int device_of(std::initializer_list<ConstTensorView> tensors) {
  for (const ConstTensorView& tensor : tensors) {
    if (tensor && tensor.numel() > 0) return jit::device_of(tensor.data());
  }
  return -1;
}

void backward_plain(Loaded& kernels, const Backward& call) {
  const Problem& p = call.plan.problem;
  PlainBackwardArgs args;
  fill(args.forward, call);
  fill_gradients(args, call);
  args.scale = p.effective_scale();
  args.scale_log2 = args.scale * std::numbers::log2e;
  args.key_work = args.forward.work;
  args.cells = static_cast<int>(cells_of(p, args.forward));
  const Scratch scratch(call.gradients.scratch_bytes, call.stream);
  args.delta = scratch_rows(p, scratch.data(), 1);
  launch_all(kernels, call, args, args.forward);
}

void backward_tensor_cores(Loaded& kernels, const Backward& call) {
  const Problem& p = call.plan.problem;
  const GpuGradientPlan& g = call.gradients;
  BackwardArgs args;
  fill(args, call);
  fill_gradients(args, call);
  args.sequences = static_cast<int>(sequences_of(p));
  constexpr std::int64_t kStatistics = 2;
  Scratch scratch(g.scratch_bytes, call.stream);
  // Sums first: they are added to and read 16 bytes at a time.
  const std::int64_t width = g.add_queries ? padded(p.head_dim) : 0, rows = p.batch * p.queries() * p.heads;
  float* next = static_cast<float*>(scratch.data());
  if (width > 0) {
    const bool boxes = g.keys.family == GpuKernels::warpgroups;
    args.query_sums = scratch_rows(p, next, width, boxes);
    next += rows * width;
    scratch.clear(static_cast<std::size_t>(rows * width) * sizeof(float));
  }
  args.key_parts = g.keys.key_parts;
  args.key_rows = p.batch * p.keys() * p.heads_kv;
  if (args.key_parts > 1) {
    args.key_sums = key_scratch_rows(p, next, padded(p.head_dim));
    next += args.key_parts * args.key_rows * padded(p.head_dim);
    args.value_sums = key_scratch_rows(p, next, padded(p.head_dim_v));
    next += args.key_parts * args.key_rows * padded(p.head_dim_v);
  }
  args.statistics = scratch_rows(p, next, kStatistics);
  launch_all(kernels, call, args, args);
}

}  // namespace

void forward(const Plan& plan, const AttentionInputs& in, const TensorView& output, const TensorView& logsumexp,
             void* stream) {
  const Problem& p = plan.problem;
  if (p.batch == 0 || p.queries() == 0) return;
  require_type("logsumexp", logsumexp, p.dtype);
  const int device = jit::device_of(output.data());
  const jit::ContextGuard context(device);
  const bool vectors = aligned({in.query, in.key, in.value, in.additional_keys, in.additional_values, output});
  Loaded kernels(
      kernels_of(plan,
                 Call{.logsumexp = logsumexp.present(),
                      .vectors = vectors,
                      .boxes = vectors && plan.engine == Engine::sm90 &&
                               addressable(p, {in.query, in.key, in.value, in.additional_keys, in.additional_values}),
                      .bias_type = bias_type_of(p, in)}),
      stream);
  const Lists lists(p, in, device, stream);
  const bool boxes = kernels.specs().begin()->kernel == Kernel::sm90_forward;
  const Scratch scratch(boxes ? plan.gpu.forward_scratch_bytes : 0, stream);
  const KeyParts parts = key_parts_of(plan, scratch.data());
  PlainForwardArgs args;
  fill(args.forward, p, in, lists);
  args.scale_log2 = p.effective_scale() * std::numbers::log2e;
  args.forward.output = rows_of(output, p.rank());
  args.forward.logsumexp = rows_of(logsumexp, p.rank());
  for (const Spec& spec : kernels.specs()) {
    if (spec.kernel == Kernel::packed_rest) {
      const RestArgs rests = rests_of(p, args.forward, {{output, false}, {logsumexp, false}});
      kernels.launch(spec, rest_blocks(plan), rests);
    } else if (spec.kernel == Kernel::plain_forward) {
      const std::int64_t tiles = ordered_tiles_of(p, args.forward, spec);
      kernels.launch(spec, {tiles, geometry::ceil_div(spec.head_dim_v, spec.wide)}, args);
    } else if (spec.kernel == Kernel::sm90_forward) {
      const std::int64_t tiles = tiles_of(p, args.forward, spec);
      launch_boxes(kernels, spec, plan, in, args.forward, parts, tiles);
    } else if (spec.kernel == Kernel::merge_parts) {
      launch_merge(kernels, spec, p, args.forward, parts);
    } else {
      const std::int64_t tiles = ordered_tiles_of(p, args.forward, spec, portable_forward(plan.gpu).heads_in_turns);
      kernels.launch(spec, tiles, args.forward);
    }
  }
}

void backward(const Plan& plan, const AttentionInputs& in, const AttentionGradInputs& grads,
              const AttentionGradients& out, void* stream) {
  const Problem& p = plan.problem;
  if (p.batch == 0) return;
  require_type("logsumexp", grads.logsumexp, p.dtype);
  require_type("grad_logsumexp", grads.grad_logsumexp, p.dtype);
  const int device = device_of({in.query, in.key, in.additional_keys, out.rpb});
  if (device < 0) return;  // nothing anywhere
  const jit::ContextGuard context(device);
  const bool vectors =
      aligned({in.query, in.key, in.value, in.additional_keys, in.additional_values, grads.output, grads.grad_output,
               out.query, out.key, out.value, out.additional_keys, out.additional_values});
  const bool boxes = vectors && plan.gpu.backward.keys.family == GpuKernels::warpgroups &&
                     addressable(p, {in.query, in.key, in.value, in.additional_keys, in.additional_values,
                                     grads.grad_output, out.query, out.key, out.value});
  Loaded kernels(kernels_of(plan, Call{.backward = true,
                                       .vectors = vectors,
                                       .boxes = boxes,
                                       .bias_type = bias_type_of(p, in),
                                       .grad_query = out.query.present(),
                                       .grad_keys = out.key || out.value,
                                       .grad_values = out.value.present(),
                                       .grad_additional = out.additional_keys || out.additional_values,
                                       .grad_bias = out.rpb.present()}),
                 stream);
  const Lists lists(p, in, device, stream);
  const GpuGradientPlan& gradients = boxes ? plan.gpu.backward : portable_gradients(plan.gpu);
  const bool plain = gradients.keys.family == GpuKernels::plain;
  (plain ? backward_plain : backward_tensor_cores)(kernels, {plan, in, grads, out, lists, stream, gradients});
}

void prepare(const Plan& plan, const CallSet& calls, int device) {
  const jit::Device& here = jit::device(device < 0 ? jit::thread_device() : device);
  const jit::Arch planned{plan.gpu.device.major, plan.gpu.device.minor};
  if (planned != here.arch) {
    throw InvalidArgument("device", std::to_string(here.ordinal) + " (" + here.name + ", " + name_of(here.arch) + ")",
                          "one of " + name_of(planned) + ", which the plan is for");
  }
  const jit::ContextGuard context(here.ordinal);
  const std::vector<Spec> specs = kernels_of(plan, calls);
  kernel_cache().load(specs, source_of);
  if (calls.backward || plan.gpu.forward_scratch_bytes > 0) (void)jit::memory_pool(here.ordinal);
}

}  // namespace vicus::gpu
