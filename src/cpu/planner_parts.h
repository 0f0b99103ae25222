// The parts of the planner: tiles are chosen in planner.cc, how they are stacked in plan_forward.cc, how they are cut
// into segments and key blocks in plan_backward.cc.
#ifndef VICUS_CPU_PLANNER_PARTS_H_
#define VICUS_CPU_PLANNER_PARTS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/domain.h"
#include "core/families.h"
#include "vicus/plan.h"

namespace vicus::cpu {

/// Bytes of one chunk of scores.
inline constexpr int kChunkBytes = 16 << 10;

/// A query tile with its exact work.
struct Scored {
  QueryTile tile;
  double pairs = 0;  ///< padded, all heads
  int fold_axis = -1;
  double folded_pairs = 0;  ///< the same of a forward pass that folds windows
  double cost = 0;
};

/// Pairs of tiles of `extent` queries with their rows of scores, where windows are folded on this axis (tiles.h) and keys
/// come in blocks.
[[nodiscard]] double folded_pairs(const geometry::Axis& axis, int extent, int kv_block);

/// Keys that `extent` queries in the middle of an axis see.
[[nodiscard]] double middle_hull(const geometry::Axis& axis, int extent);

/// Rows of `bytes_per_key` that fit into `budget`, at least a chunk.
[[nodiscard]] int packed_keys(std::size_t bytes_per_key, std::size_t budget, int chunk);

/// `grid` is the largest cell. Fill plan.forward and plan.backward for the tile.
void plan_forward(Plan& plan, const Scored& best, const std::vector<Family>& list, const geometry::Grid& grid,
                  std::int64_t cells);
void plan_backward(Plan& plan, const Scored& best, const std::vector<Family>& list, const geometry::Grid& grid,
                   std::int64_t cells);

}  // namespace vicus::cpu

#endif  // VICUS_CPU_PLANNER_PARTS_H_
