// Plans of problems already seen: choosing one costs more than a small attention.
#ifndef VICUS_TORCH_PLANS_H_
#define VICUS_TORCH_PLANS_H_

#include <memory>
#include <span>

#include "torch/tensors.h"
#include "vicus/plan.h"

namespace vicus::binding {

enum class Pass : std::uint8_t { forward, backward };

/// The operators' `options` as the core's. The list is empty (every default) or holds, in this order: engine,
/// deterministic, kv_parallelism, memory preference, 3 kv_splits, 3 extents of the forward query tile, 3 of the backward
/// one, 3 of the forward key tile (trailing axes last). Throws InvalidArgument on another length or an unknown value.
/// Tensors on a CUDA device are computed there, by engine sm80 or sm90 where one is named.
[[nodiscard]] PlanOptions plan_options(const Place& place, std::span<const std::int64_t> options, Pass pass);

/// The plan of `problem` on as many threads as PyTorch is set to now. Kept for later calls with the same arguments, up
/// to a fixed number of plans; thread-safe. `made`, if given, becomes true where there was none.
[[nodiscard]] std::shared_ptr<const Plan> plan_for(const Problem& problem, const PlanOptions& options,
                                                   bool* made = nullptr);

}  // namespace vicus::binding

#endif  // VICUS_TORCH_PLANS_H_
