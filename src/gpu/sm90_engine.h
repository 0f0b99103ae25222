// The forward pass by boxes and warpgroups: from views to what its kernel is called with.
#ifndef VICUS_GPU_SM90_ENGINE_H_
#define VICUS_GPU_SM90_ENGINE_H_

#include <cstdint>

#include "gpu/launch.h"
#include "gpu/sm90_args.h"
#include "vicus/attention.h"

namespace vicus::gpu {

/// Whether the copy engine can address the rows of all inputs, which start at multiples of 16 bytes.
[[nodiscard]] bool addressable(const Problem& problem, const AttentionInputs& in);

/// `args` is complete, `blocks` counts its tiles. Throws Unsupported for more tiles than an int counts.
void launch_boxes(const Loaded& kernels, const Spec& spec, const Plan& plan, const AttentionInputs& in,
                  const ForwardArgs& args, std::int64_t blocks);

}  // namespace vicus::gpu

#endif  // VICUS_GPU_SM90_ENGINE_H_
