// What one backward call shares between its tasks.
//
// Per cell and key/value head, queries lie in tiles and keys in blocks. A *segment* task owns a box of query tiles and
// sums their dQ over all key blocks they see. Where all queries of a key block lie in the segment, the same visit also
// sums the block's dK and dV: five products per pair. Key blocks seen from several segments are *border* tasks of their
// own, which compute scores once more: seven products per pair there. One segment per head is the classic single pass;
// more segments buy parallelism and bounded scratch. Every sum has one owner and one order, so results are bit-exact from
// run to run; dQ, dK and dV also do not depend on how queries were cut into segments.
#ifndef VICUS_CPU_BACKWARD_H_
#define VICUS_CPU_BACKWARD_H_

#include <vector>

#include "core/domain.h"
#include "cpu/cell_tasks.h"
#include "cpu/layout.h"
#include "vicus/attention.h"

namespace vicus::cpu {

/// Query tiles of one segment of one key/value head.
[[nodiscard]] std::int64_t segment_tile_count(const BackwardPlan& plan);

/// Whether one segment of `segment_queries` holds all queries of one axis that see a key block: then that segment sums the
/// block's gradients, otherwise the block is a border block. Planner and both kinds of task ask here.
[[nodiscard]] inline bool in_one_segment(geometry::Span seen_by, int segment_queries) {
  return !seen_by.empty() && seen_by.begin / segment_queries == (seen_by.end - 1) / segment_queries;
}

struct BackwardContext {
  BackwardContext(const Plan& plan, const AttentionInputs& inputs, const AttentionGradInputs& grad_inputs,
                  const AttentionGradients& gradients);

  const Plan& plan;
  const Problem& problem;
  const AttentionInputs& in;
  const AttentionGradInputs& grads;
  const AttentionGradients& out;
  Domain domain;
  BackwardLayout layout;

  /// The numbering of tasks: segments (or, for the gradient of rpb, slots of segments), border blocks, blocks of
  /// additional tokens; in each kind the key/value heads of a task are neighbours.
  CellTasks segments, blocks;
  std::int64_t additional_blocks = 0;
  std::int64_t segment_tasks = 0, border_tasks = 0, additional_tasks = 0;
  [[nodiscard]] std::int64_t tasks() const { return segment_tasks + border_tasks + additional_tasks; }

  /// Gradient of rpb: each slot owns a float64 table [group][rpb] and every slots-th segment of its key/value head, in
  /// order; the tables are added in the order of slots. Zero slots: not wanted.
  std::int64_t rpb_slots = 0, rpb_table = 0;
  std::vector<double> rpb_sums;  ///< [Hkv][slots][group][table]
};

void backward_task_f32(BackwardContext& context, std::int64_t task, std::byte* scratch);
void backward_task_f64(BackwardContext& context, std::int64_t task, std::byte* scratch);

}  // namespace vicus::cpu

#endif  // VICUS_CPU_BACKWARD_H_
