// What one forward call shares between its tasks.
#ifndef VICUS_CPU_FORWARD_H_
#define VICUS_CPU_FORWARD_H_

#include "core/domain.h"
#include "cpu/layout.h"
#include "vicus/attention.h"

namespace vicus::cpu {

/// Tasks are numbered cell by cell, in a cell block by block, then key/value head by head: the heads of a token are
/// neighbours in memory, so that a block's pages and cache lines serve all heads before they are left. A block is a stack
/// of query tiles that share packed keys. Cells have as many blocks as the largest of them: a task may find nothing to do.
struct ForwardContext {
  ForwardContext(const Plan& the_plan, const AttentionInputs& inputs, const TensorView& out, const TensorView& lse)
      : plan(the_plan), problem(the_plan.problem), in(inputs), output(out), logsumexp(lse), domain(problem),
        layout(problem, plan.forward) {}

  const Plan& plan;
  const Problem& problem;
  const AttentionInputs& in;
  const TensorView& output;
  const TensorView& logsumexp;
  Domain domain;
  ForwardLayout layout;
};

/// Runs one task in `scratch` (layout.bytes, 64-byte aligned), on the best target of this machine.
void forward_task_f32(const ForwardContext& context, std::int64_t task, std::byte* scratch);
void forward_task_f64(const ForwardContext& context, std::int64_t task, std::byte* scratch);

}  // namespace vicus::cpu

#endif  // VICUS_CPU_FORWARD_H_
