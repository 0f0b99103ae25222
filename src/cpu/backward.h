// What one backward call shares between its tasks.
//
// Per cell and key/value head, queries lie in tiles and keys in blocks. A *segment* task owns a box of query tiles and
// sums their dQ over all key blocks they see. Where all queries of a key block lie in the segment, the same visit also
// sums the block's dK and dV: five products per pair. Key blocks seen from several segments are *border* tasks of their
// own, which compute scores once more: seven products per pair there. One segment per head is the classic single pass;
// more segments buy parallelism and bounded scratch. Where heads are few and all segments see most keys, they *relay* key
// blocks instead: a segment adds its part to the sums that the one before left in the output, once that one is past the
// block; five products per pair, and the threads run one block apart. Every sum has one order, so results are bit-exact
// from run to run; dQ, dK and dV also do not depend on how queries were cut into segments.
#ifndef VICUS_CPU_BACKWARD_H_
#define VICUS_CPU_BACKWARD_H_

#include <atomic>
#include <vector>

#include "core/domain.h"
#include "cpu/cell_tasks.h"
#include "cpu/layout.h"
#include "vicus/attention.h"

namespace vicus::cpu {

/// Query tiles of one segment of one key/value head.
[[nodiscard]] std::int64_t segment_tile_count(const BackwardPlan& plan);

/// Whether segments of `segment_queries` sum the gradients of a key block that these queries of one axis see: one that
/// holds them all or, with a relay, one after the other. Otherwise it is a border block. Planner and both kinds of task
/// ask here.
[[nodiscard]] inline bool in_segments(geometry::Span seen_by, int segment_queries, bool relay) {
  return !seen_by.empty() && (relay || seen_by.begin / segment_queries == (seen_by.end - 1) / segment_queries);
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
  /// With a relay, of each segment task: key blocks before this one are done. Tasks begin in their order, so a segment waits
  /// for none that has not begun.
  std::vector<std::atomic<int>> past;
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
