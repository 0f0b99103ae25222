// Kernels by boxes and warpgroups: from views to what they are called with.
#ifndef VICUS_GPU_SM90_ENGINE_H_
#define VICUS_GPU_SM90_ENGINE_H_

#include <cstdint>
#include <initializer_list>

#include "gpu/launch.h"
#include "gpu/sm90_args.h"
#include "vicus/attention.h"

namespace vicus::gpu {

/// Whether the copy engine can address the rows of `tensors`, which start at multiples of 16 bytes; those of absent ones it can.
[[nodiscard]] bool addressable(const Problem& problem, std::initializer_list<ConstTensorView> tensors);

/// What parts of the keys give, in scratch: `count` outputs and logsumexps in float32, each of `rows` rows.
struct KeyParts {
  int count = 1;
  std::int64_t rows = 0;
  Rows output, logsumexp;  ///< of the first part
};

/// `args` is complete, `tiles` counts tiles of queries. Throws Unsupported for more tiles than an int counts.
void launch_boxes(Loaded& kernels, const Spec& spec, const Plan& plan, const AttentionInputs& in,
                  const ForwardArgs& args, const KeyParts& parts, std::int64_t tiles);

/// Merges them into the output and the logsumexp of `args`.
void launch_merge(Loaded& kernels, const Spec& spec, const Problem& problem, const ForwardArgs& args,
                  const KeyParts& parts);

/// The same of a kernel for gradients, `blocks` of its rows. Throws Unsupported too for more rows of statistics.
void launch_boxes(Loaded& kernels, const Spec& spec, const Plan& plan, const AttentionInputs& in,
                  const ConstTensorView& grad_output, const AttentionGradients& out, const BackwardArgs& args,
                  std::int64_t blocks);

}  // namespace vicus::gpu

#endif  // VICUS_GPU_SM90_ENGINE_H_
