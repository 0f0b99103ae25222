// Merging of partial attentions: checks, and calls of an engine.
#include "core/merge.h"

#include <string>

#include "core/checks.h"
#include "vicus/error.h"
#include "vicus/merge.h"

namespace vicus {
namespace {

std::string part_name(std::string list, std::size_t part) {
  list += '[';
  list += std::to_string(part);
  list += ']';
  return list;
}

MergeParts checked(std::span<const ConstTensorView> outputs, std::span<const ConstTensorView> logsumexps) {
  if (outputs.empty()) throw InvalidArgument("outputs", "no part", "at least one");
  if (logsumexps.size() != outputs.size()) {
    throw InvalidArgument("logsumexps", std::to_string(logsumexps.size()) + " parts",
                          "as many as outputs: " + std::to_string(outputs.size()));
  }
  require_present("outputs[0]", outputs[0]);
  if (outputs[0].dims() < 4) {
    throw InvalidArgument("outputs[0].shape", shape_text(outputs[0]), "[batch, 1 to 3 token axes, heads, head_dim_v]");
  }
  const MergeParts parts = {outputs, logsumexps};
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    require_input(part_name("outputs", i), outputs[i], parts.shape(), parts.dtype());
    require_logsumexp(part_name("logsumexps", i), logsumexps[i], parts.row_shape(), parts.dtype(), false);
  }
  return parts;
}

const MergeEngine& engine_of(Engine engine) {
  switch (engine) {
    case Engine::automatic:
    case Engine::cpu:
      return cpu::kMerge;
    case Engine::sm80:
    case Engine::sm90:
      return gpu::kMerge;
    default:
      throw Unsupported("engine " + std::string(engine_name(engine)) + " does not merge; cpu and sm80 do");
  }
}

}  // namespace

void merge_forward(std::span<const ConstTensorView> outputs, std::span<const ConstTensorView> logsumexps,
                   const TensorView& output, const TensorView& logsumexp, Engine engine, void* stream) {
  const MergeEngine& run = engine_of(engine);
  const MergeParts parts = checked(outputs, logsumexps);
  require_output("output", output, parts.shape(), parts.dtype());
  if (logsumexp) require_logsumexp("logsumexp", logsumexp, parts.row_shape(), parts.dtype(), true);
  run.forward(parts, output, logsumexp, stream);
}

void merge_backward(std::span<const ConstTensorView> outputs, std::span<const ConstTensorView> logsumexps,
                    const ConstTensorView& grad_output, const ConstTensorView& grad_logsumexp,
                    std::span<const TensorView> grad_outputs, std::span<const TensorView> grad_logsumexps,
                    Engine engine, void* stream) {
  const MergeEngine& run = engine_of(engine);
  const MergeParts parts = checked(outputs, logsumexps);
  require_input("grad_output", grad_output, parts.shape(), parts.dtype());
  if (grad_logsumexp) require_logsumexp("grad_logsumexp", grad_logsumexp, parts.row_shape(), parts.dtype(), false);
  const auto check_count = [&](const char* name, std::size_t got) {
    if (got != 0 && got != parts.count()) {
      throw InvalidArgument(name, std::to_string(got) + " parts",
                            "none, or as many as outputs: " + std::to_string(parts.count()));
    }
  };
  check_count("grad_outputs", grad_outputs.size());
  check_count("grad_logsumexps", grad_logsumexps.size());
  for (std::size_t i = 0; i < parts.count(); ++i) {
    if (!grad_outputs.empty() && grad_outputs[i]) {
      require_output(part_name("grad_outputs", i), grad_outputs[i], parts.shape(), parts.dtype());
    }
    if (!grad_logsumexps.empty() && grad_logsumexps[i]) {
      require_logsumexp(part_name("grad_logsumexps", i), grad_logsumexps[i], parts.row_shape(), parts.dtype(), true);
    }
  }
  run.backward(parts, grad_output, grad_logsumexp, {grad_outputs, grad_logsumexps}, stream);
}

}  // namespace vicus
