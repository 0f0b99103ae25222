// Tiles of the GPU kernels.
#ifndef VICUS_GPU_PLANNER_H_
#define VICUS_GPU_PLANNER_H_

#include <string>

#include "vicus/plan.h"

namespace vicus::gpu {

/// Empty when the kernels take the (valid) problem, otherwise the reason in words.
[[nodiscard]] std::string supports(const Problem& problem);

/// Fills `plan.gpu` for `options.gpu`, or the device of the calling thread where that is not set.
void plan_problem(Plan& plan, const PlanOptions& options);

}  // namespace vicus::gpu

#endif  // VICUS_GPU_PLANNER_H_
