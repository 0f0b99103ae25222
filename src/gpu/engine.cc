#include "gpu/engine.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <numbers>

#include "core/domain.h"
#include "gpu/args.h"
#include "gpu/kernels.h"
#include "gpu/spec.h"
#include "jit/device.h"
#include "jit/driver.h"
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

Bias relative_bias_of(const ConstTensorView& table, int rank) {
  Bias bias;
  bias.data = const_cast<void*>(table.data());
  bias.head = table.stride(0);
  for (int i = 0; i < rank; ++i) bias.axis[3 - rank + i] = table.stride(1 + i);
  return bias;
}

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

jit::KernelCache<Spec>& kernel_cache() {
  static jit::KernelCache<Spec> cache;
  return cache;
}

/// The kernels of a call, loaded: all of them before the first is launched, so that what cannot be compiled or may not be
/// compiled now (a stream under capture) fails before anything is written.
class Loaded {
 public:
  Loaded(const Kernels& kernels, void* stream) : kernels_(kernels), stream_(stream) {
    for (std::size_t i = 0; i < kernels_.size(); ++i) {
      loaded_.at(i) = &kernel_cache().get(kernels_.begin()[i], stream, source_of);
    }
  }

  [[nodiscard]] const Kernels& specs() const { return kernels_; }

  template <class Args>
  void launch(const Spec& spec, std::int64_t blocks, const Args& args) const {
    if (blocks == 0) return;
    if (blocks > std::numeric_limits<int>::max()) {
      throw Unsupported("engine sm80 launches at most 2147483647 blocks, the problem has " + std::to_string(blocks));
    }
    const jit::Kernel& kernel = *loaded_.at(static_cast<std::size_t>(&spec - kernels_.begin()));
    jit::launch(kernel, {.x = static_cast<unsigned>(blocks)}, spec.threads(), shared_bytes(spec), stream_, &args,
                sizeof(args));
  }

 private:
  Kernels kernels_;
  std::array<const jit::Kernel*, Kernels::kMost> loaded_{};
  void* stream_;
};

DType bias_type_of(const Problem& p, const AttentionInputs& in) {
  return p.rpb ? in.rpb.dtype() : p.attn_bias ? in.attn_bias.dtype() : DType::float32;
}

bool aligned(std::initializer_list<ConstTensorView> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const ConstTensorView& t) { return aligned(t); });
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
    args.work.classes[a] = mask == nullptr ? 1 : static_cast<int>(std::min(mask->dilation[i], p.layout[i]));
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

/// Memory of the stream's device, given back in the order of the stream.
class Scratch {
 public:
  Scratch(std::size_t bytes, void* stream) : stream_(static_cast<jit::CUstream>(stream)) {
    if (bytes > 0)
      jit::check(jit::driver().cuMemAllocAsync(&data_, bytes, stream_), "cuMemAllocAsync", "taking scratch");
  }
  ~Scratch() {
    if (data_ != 0) jit::driver().cuMemFreeAsync(data_, stream_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void clear(std::size_t bytes) {
    jit::check(jit::driver().cuMemsetD8Async(data_, 0, bytes, stream_), "cuMemsetD8Async", "clearing scratch");
  }
  [[nodiscard]] void* data() const {
    return reinterpret_cast<void*>(data_);  // NOLINT(performance-no-int-to-ptr): the driver's addresses are integers
  }

 private:
  jit::CUstream stream_;
  jit::CUdeviceptr data_ = 0;
};

// A contiguous float32 tensor [B, *X, H, width].
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
  ForwardArgs args;
  fill(args, p, in);
  args.output = rows_of(output, p.rank());
  args.logsumexp = rows_of(logsumexp, p.rank());
  args.work.head_blocks = head_blocks(args, spec);
  const std::int64_t blocks = cut(args.work, args.len, spec.tile_q) * args.work.head_blocks * cells_of(args, p.batch);
  kernels.launch(spec, blocks, args);
}

namespace {

/// Blocks of one backward kernel; sets the work that they share.
std::int64_t backward_blocks(const Spec& s, BackwardArgs& args, const Problem& p, const TensorView& grad_bias) {
  const std::int64_t rows = p.batch * p.queries() * p.heads, cells = cells_of(args, p.batch);
  const auto each = [](std::int64_t work, std::int64_t of_a_block) { return (work + of_a_block - 1) / of_a_block; };
  switch (s.kernel) {
    case Kernel::delta:
      return each(rows, s.threads() / 8);
    case Kernel::queries:
      args.work.head_blocks = head_blocks(args, s);
      return cut(args.work, args.len, s.tile_q) * args.work.head_blocks * cells;
    case Kernel::keys: {
      const int dense_keys[3] = {1, 1, args.keys};
      args.work.head_blocks = args.heads_kv;
      return cut(args.work, p.dense() ? dense_keys : args.len, s.tile_kv) * args.heads_kv * cells;
    }
    case Kernel::additional:
      args.work.head_blocks = args.heads_kv;
      args.work.tiles[0] = args.work.tiles[1] = 1;
      args.work.tiles[2] = geometry::ceil_div(args.additional, s.keys());
      return args.work.tiles[2] * p.heads_kv * p.batch;
    case Kernel::convert:
      return each(rows * padded(p.head_dim) / 2, s.threads());
    case Kernel::bias:
      return grad_bias.numel();
    case Kernel::forward:
      break;
  }
  return 0;
}

}  // namespace

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
  const int rank = p.rank();
  BackwardArgs args;
  fill(args, p, in);
  args.output = rows_of(grads.output, rank);
  args.logsumexp = rows_of(grads.logsumexp, rank);
  args.grad_output = rows_of(grads.grad_output, rank);
  args.grad_logsumexp = rows_of(grads.grad_logsumexp, rank);
  args.grad_query = rows_of(out.query, rank);
  args.grad_key = rows_of(out.key, rank);
  args.grad_value = rows_of(out.value, rank);
  args.grad_additional_keys = rows_of(out.additional_keys, 1);
  args.grad_additional_values = rows_of(out.additional_values, 1);
  if (out.rpb) args.grad_bias = relative_bias_of(out.rpb, rank);
  args.batch = args.sequences = static_cast<int>(p.batch);

  constexpr std::int64_t kStatistics = 2;
  Scratch scratch(plan.gpu.backward_scratch_bytes, stream);
  args.statistics = scratch_rows(p, scratch.data(), kStatistics);
  if (plan.gpu.add_queries) {
    const std::int64_t rows = p.batch * p.queries() * p.heads;
    args.query_sums = scratch_rows(p, static_cast<float*>(scratch.data()) + rows * kStatistics, padded(p.head_dim));
    scratch.clear(plan.gpu.backward_scratch_bytes);
  }
  for (const Spec& spec : kernels.specs()) {
    const std::int64_t blocks = backward_blocks(spec, args, p, out.rpb);
    kernels.launch(spec, blocks, args);
  }
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
