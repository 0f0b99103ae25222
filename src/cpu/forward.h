// What one forward call shares between its tasks.
#ifndef VICUS_CPU_FORWARD_H_
#define VICUS_CPU_FORWARD_H_

#include "core/domain.h"
#include "cpu/cell_tasks.h"
#include "cpu/layout.h"
#include "vicus/attention.h"

namespace vicus::cpu {

/// Outputs of this size leave the caches of a core before anyone could read them there.
inline constexpr std::size_t kStreamBytes = std::size_t{4} << 20;

/// Tasks are numbered cell by cell, in a cell block by block, then head by head: the heads of a token are neighbours in
/// memory, so that a block's pages and cache lines serve all heads before they are left. A block is a stack of query tiles
/// that share packed keys.
struct ForwardContext {
  ForwardContext(const Plan& the_plan, const AttentionInputs& inputs, const TensorView& out, const TensorView& lse)
      : plan(the_plan),
        problem(the_plan.problem),
        in(inputs),
        output(out),
        logsumexp(lse),
        domain(problem),
        stream(static_cast<std::size_t>(out.numel()) * dtype_size(out.dtype()) >= kStreamBytes),
        layout(problem, plan.forward),
        head_tiles(geometry::ceil_div(static_cast<int>(problem.heads / problem.heads_kv), plan.forward.tile.heads)),
        head_blocks(geometry::ceil_div(head_tiles, plan.forward.stack_heads)),
        blocks(domain, [this](const Cell& cell) {
          std::int64_t n = 1;
          for (int a = 0; a < geometry::kRank; ++a) n *= block_count(cell, a);
          return n;
        }) {}

  [[nodiscard]] int tile_count(const Cell& cell, int a) const {
    return geometry::ceil_div(cell.grid.axis[a].queries, plan.forward.tile.extent[static_cast<std::size_t>(a)]);
  }
  [[nodiscard]] int block_count(const Cell& cell, int a) const {
    return geometry::ceil_div(tile_count(cell, a), plan.forward.stack[static_cast<std::size_t>(a)]);
  }
  [[nodiscard]] std::int64_t tasks() const { return blocks.total() * head_blocks * problem.heads_kv; }

  const Plan& plan;
  const Problem& problem;
  const AttentionInputs& in;
  const TensorView& output;
  const TensorView& logsumexp;
  Domain domain;
  bool stream;  ///< the output goes past the caches
  ForwardLayout layout;
  int head_tiles, head_blocks;  ///< of one key/value head
  CellTasks blocks;
};

/// Whether 16 rows of float32 can fold windows (tiles.h) on the best target of this machine.
[[nodiscard]] bool folds_f32();

/// Runs one task in `scratch` (layout.bytes, 64-byte aligned), on the best target of this machine.
void forward_task_f32(const ForwardContext& context, std::int64_t task, std::byte* scratch);
void forward_task_f64(const ForwardContext& context, std::int64_t task, std::byte* scratch);

}  // namespace vicus::cpu

#endif  // VICUS_CPU_FORWARD_H_
