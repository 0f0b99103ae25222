// Tiles, blocks and scratch of the CPU engine.
#ifndef VICUS_CPU_PLANNER_H_
#define VICUS_CPU_PLANNER_H_

#include "vicus/plan.h"

namespace vicus::cpu {

/// Fills `forward`, `backward` and `candidates` of a plan whose problem is valid.
void plan_problem(Plan& plan, const PlanOptions& options);

}  // namespace vicus::cpu

#endif  // VICUS_CPU_PLANNER_H_
