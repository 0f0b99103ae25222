// Tiles of the GPU kernels.
#ifndef VICUS_GPU_PLANNER_H_
#define VICUS_GPU_PLANNER_H_

#include <cstddef>
#include <string>
#include <vector>

#include "gpu/spec.h"
#include "vicus/plan.h"

namespace vicus::gpu {

/// Empty when the kernels take the (valid) problem, otherwise the reason in words.
[[nodiscard]] std::string supports(const Problem& problem);

/// The same of the forward pass by boxes and warpgroups, engine sm90. Whether gradients go so, plan_box_gradients knows.
[[nodiscard]] std::string supports_boxes(const Problem& problem);

/// Tiles of that forward pass on `plan.gpu.device`: no rows where none fits, and what was considered. Tiles that the
/// options name are taken where there are such.
struct BoxPlan {
  GpuKernelPlan best;
  std::vector<TileCandidate> candidates;
};
[[nodiscard]] BoxPlan plan_boxes(const Plan& plan, const PlanOptions& options);

/// Scratch for what parts of the keys give there, where there are several: outputs and logsumexps.
[[nodiscard]] std::size_t parts_bytes(const Problem& problem, int parts);

/// Scratch for dK and dV of parts of the query heads, where there are several.
[[nodiscard]] std::size_t head_parts_bytes(const Problem& problem, int parts);

/// GpuKernelPlan::heads_in_turns of a kernel of the plan; of keys, GpuKernelPlan::heads_inside is known.
[[nodiscard]] int heads_in_turns(const Plan& plan, Kernel kernel);

/// GpuKernelPlan::heads_inside of a kernel of keys that would be the plan's; `adds`: that sums dQ, too.
[[nodiscard]] bool heads_inside(const Plan& plan, const GpuKernelPlan& keys, bool adds);

/// Pairs that a machine with no multiprocessor idle computes in the time of a forward pass, of either engine.
[[nodiscard]] double busy_pairs(const Plan& plan, const GpuKernelPlan& forward);

/// The same of the gradients: no rows where there is none. Of problems that `supports_boxes`; `asked`: by one kernel for all
/// where that can be, also where two are faster.
[[nodiscard]] GpuGradientPlan plan_box_gradients(const Plan& plan, bool asked);

/// Products of all pairs of tiles, for the gradients. One kernel for all has five of a pair, which take about as long as the
/// seven of two kernels.
[[nodiscard]] double gradient_products(const GpuGradientPlan& plan);

/// Fills `plan.gpu` for `options.gpu`, or the device of the calling thread where that is not set.
void plan_problem(Plan& plan, const PlanOptions& options);

}  // namespace vicus::gpu

#endif  // VICUS_GPU_PLANNER_H_
