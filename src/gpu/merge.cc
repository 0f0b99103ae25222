// Merging on the GPU: kMaxMergeParts parts a kernel, see merge_args.h.
#include "core/merge.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>
#include <vector>

#include "gpu/launch.h"
#include "gpu/merge_args.h"
#include "gpu/spec.h"
#include "jit/device.h"

namespace vicus::gpu {
namespace {

constexpr std::size_t kMost = kMaxMergeParts;

DType logsumexp_type(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// One merge: the shape, and launches for some of its parts.
class Merge {
 public:
  Merge(const MergeParts& parts, void* stream)
      : parts_(parts),
        stream_(stream),
        rank_(static_cast<int>(parts.shape().size()) - 3),
        batch_(parts.shape()[0]),
        rows_(batch_ > 0 ? parts.rows() / batch_ : 0) {
    require_countable("tokens times heads", rows_);
    shape_.batch = static_cast<int>(batch_);
    shape_.heads = static_cast<int>(parts.row_shape().back());
    for (int i = 0; i < rank_; ++i) shape_.len[3 - rank_ + i] = static_cast<int>(parts.shape()[1 + i]);
  }

  // Arguments with the shape, and parts [first, first + count).
  [[nodiscard]] MergeArgs args(std::size_t first, std::size_t count) const {
    MergeArgs args = shape_;
    for (std::size_t i = 0; i < count; ++i) add(args, parts_.outputs[first + i], parts_.logsumexps[first + i]);
    return args;
  }
  void add(MergeArgs& args, const ConstTensorView& output, const ConstTensorView& logsumexp) const {
    args.outputs[args.parts] = rows(output);
    args.logsumexps[args.parts++] = rows(logsumexp);
  }
  [[nodiscard]] Rows rows(const ConstTensorView& t) const { return rows_of(t, rank_); }

  // The kernels of a call, all loaded before the first runs.
  [[nodiscard]] Loaded load(std::initializer_list<Kernel> list, bool vectors) const {
    Kernels kernels;
    for (const Kernel kernel : list) {
      kernels.add(merge_spec(kernel, parts_.dtype(), static_cast<int>(parts_.width()), vectors));
    }
    return {kernels, stream_};
  }
  void run(Loaded& loaded, std::size_t kernel, const MergeArgs& args) const {
    const Spec& spec = loaded.specs().begin()[kernel];
    const std::int64_t per_block = spec.threads() / spec.lanes;
    loaded.launch(spec, {(rows_ + per_block - 1) / per_block, std::min(batch_, kMostGridY)}, args);
  }
  [[nodiscard]] std::size_t count() const { return parts_.count(); }

 private:
  const MergeParts& parts_;
  void* stream_;
  int rank_;
  std::int64_t batch_, rows_;
  MergeArgs shape_;
};

bool aligned(std::span<const ConstTensorView> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const ConstTensorView& t) { return gpu::aligned({t}); });
}

// What is merged so far, while more parts wait.
struct Partial {
  TensorView output, logsumexp;
};

void forward(const MergeParts& parts, const TensorView& output, const TensorView& logsumexp, void* stream) {
  if (output.numel() == 0 && (!logsumexp || logsumexp.numel() == 0)) return;
  const jit::ContextGuard context(jit::device_of(output.numel() > 0 ? output.data() : logsumexp.data()));
  const Merge merge(parts, stream);
  const bool vectors = aligned(parts.outputs) && gpu::aligned({output});
  Loaded loaded = merge.load({Kernel::merge_forward}, vectors);
  // Two places in turn: a kernel must not write what it reads.
  const DType sums = logsumexp_type(parts.dtype());
  const auto padded_bytes = [](std::int64_t elements, DType dtype) {
    return (static_cast<std::size_t>(elements) * dtype_size(dtype) + 15) / 16 * 16;
  };
  const std::size_t output_bytes = padded_bytes(parts.rows() * parts.width(), parts.dtype());
  const std::size_t place_bytes = output_bytes + padded_bytes(parts.rows(), sums);
  const std::size_t places = parts.count() <= kMost ? 0 : parts.count() <= 2 * kMost - 1 ? 1 : 2;
  const Scratch scratch(places * place_bytes, stream);
  const auto place = [&](std::size_t n) {
    std::byte* const data = static_cast<std::byte*>(scratch.data()) + n * place_bytes;
    return Partial{TensorView(data, parts.dtype(), TensorLayout(parts.shape())),
                   TensorView(data + output_bytes, sums, TensorLayout(parts.row_shape()))};
  };
  std::size_t done = std::min(parts.count(), kMost);
  MergeArgs args = merge.args(0, done);
  for (std::size_t round = 0;; ++round) {
    const bool last = done == parts.count();
    const Partial to = last ? Partial{output, logsumexp} : place(round % 2);
    args.output = merge.rows(to.output);
    args.logsumexp = merge.rows(to.logsumexp);
    merge.run(loaded, 0, args);
    if (last) return;
    const std::size_t more = std::min(parts.count() - done, kMost - 1);
    args = merge.args(done, more);
    merge.add(args, to.output, to.logsumexp);
    done += more;
  }
}

void backward(const MergeParts& parts, const ConstTensorView& grad_output, const ConstTensorView& grad_logsumexp,
              const MergeGradients& gradients, void* stream) {
  if (parts.rows() == 0) return;
  const jit::ContextGuard context(jit::device_of(parts.logsumexps[0].data()));
  const Merge merge(parts, stream);
  bool vectors = aligned(parts.outputs) && gpu::aligned({grad_output});
  for (const TensorView& t : gradients.outputs) vectors = vectors && gpu::aligned({t});
  const bool several = parts.count() > kMost;
  Loaded loaded = several ? merge.load({Kernel::merge_backward, Kernel::merge_sums}, vectors)
                          : merge.load({Kernel::merge_backward}, vectors);
  constexpr std::size_t kSums = 3;
  const Scratch scratch(
      several ? kSums * static_cast<std::size_t>(parts.rows()) * dtype_size(logsumexp_type(parts.dtype())) : 0, stream);
  const auto each = [&](std::size_t kernel, const auto& finish) {
    for (std::size_t first = 0; first < parts.count(); first += kMost) {
      MergeArgs args = merge.args(first, std::min(parts.count() - first, kMost));
      args.grad_output = merge.rows(grad_output);
      args.grad_logsumexp = merge.rows(grad_logsumexp);
      args.sums = scratch.data();
      args.first = first == 0;
      finish(args, first);
      merge.run(loaded, kernel, args);
    }
  };
  if (several) each(1, [](MergeArgs&, std::size_t) {});
  each(0, [&](MergeArgs& args, std::size_t first) {
    for (std::size_t i = 0; i < static_cast<std::size_t>(args.parts); ++i) {
      if (!gradients.outputs.empty()) args.grad_outputs[i] = merge.rows(gradients.outputs[first + i]);
      if (!gradients.logsumexps.empty()) args.grad_logsumexps[i] = merge.rows(gradients.logsumexps[first + i]);
    }
  });
}

}  // namespace

const MergeEngine kMerge = {forward, backward};

}  // namespace vicus::gpu
