// Stacks of query tiles that share packed keys.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cpu/layout.h"
#include "cpu/planner_parts.h"

namespace vicus::cpu {
namespace {

/// Bytes of packed keys and values of one box: half of a small L2 cache.
constexpr std::size_t kPackBytes = 192 << 10;
/// Bytes of queries and sums of a stack of tiles: the other half.
constexpr std::size_t kStateBytes = 512 << 10;
/// Bytes of a ring of packed keys and values.
constexpr std::size_t kRingBytes = 384 << 10;
/// Of a task's time, what a thread waits for the others at the end.
constexpr double kUneven = 0.1;

/// Bytes of one packed key and its value.
std::size_t packed_bytes(const Problem& p) {
  return (static_cast<std::size_t>(blocks(p.head_dim)) * kBlock +
          round_up(static_cast<std::size_t>(p.head_dim_v), kPad)) *
         element_bytes(p.dtype);
}

std::int64_t forward_tasks(const Problem& p, const ForwardPlan& f, const Position& tiles, std::int64_t cells) {
  const int head_tiles = geometry::ceil_div(static_cast<int>(p.heads / p.heads_kv), f.tile.heads);
  std::int64_t n = cells * p.heads_kv * geometry::ceil_div(head_tiles, f.stack_heads);
  for (std::size_t a = 0; a < 3; ++a) n *= geometry::ceil_div(tiles[a], f.stack[a]);
  return n;
}

/// Most keys that `extent` neighbouring queries of a tile grid see on an axis, over all cells.
int largest_hull(const std::vector<Family>& list, int a, int extent) {
  int most = 1;
  for (const Family& family : list) {
    for (const auto& c : family.axes[static_cast<std::size_t>(a)]) {
      for (int q = 0; q < c.axis.queries; q += extent) {
        most = std::max(most, geometry::hull(c.axis, {q, geometry::lo(q + extent, c.axis.queries)}).size());
      }
    }
  }
  return most;
}

/// Rolls a ring of packed lines with the tiles where one tile's hull fits into the ring: chooses the stack that packs
/// fewest rows, as the busiest thread has them, and the axis that the ring moves along. Returns whether there is one. A ring
/// along the last axis would hold single keys of a line next to each other, so that is for one axis only.
bool choose_rolling(const Plan& plan, ForwardPlan& f, const std::vector<Family>& list, const geometry::Grid& grid,
                    const Position& tiles, std::int64_t cells) {
  const Problem& p = plan.problem;
  if (p.dense() || p.additional_tokens > 0) return false;
  const double budget = static_cast<double>(kRingBytes) / static_cast<double>(packed_bytes(p));
  std::size_t outer = 0;  // the first axis with keys to move over
  while (outer < 2 && grid.axis[outer].keys <= 1) ++outer;
  std::array<std::vector<int>, 3> cuts;  // tiles per axis of a stack
  for (std::size_t a = 0; a < 3; ++a) {
    for (int pieces = 1; pieces <= tiles[a]; pieces = pieces < 8 ? pieces + 1 : pieces * 2) {
      cuts[a].push_back(geometry::ceil_div(tiles[a], pieces));
    }
    cuts[a].push_back(1);
  }
  ForwardPlan trial = f;
  trial.stack_heads = geometry::ceil_div(static_cast<int>(p.heads / p.heads_kv), f.tile.heads);
  double least = std::numeric_limits<double>::infinity();
  for (const int i : cuts[0]) {
    for (const int j : cuts[1]) {
      for (const int k : cuts[2]) {
        trial.stack = {i, j, k};
        const std::int64_t tasks = forward_tasks(p, trial, tiles, cells);
        double rows = 1;
        for (std::size_t a = 0; a < 3; ++a) {
          const auto pieces = static_cast<double>(geometry::ceil_div(tiles[a], trial.stack[a]));
          rows *= pieces * middle_hull(grid.axis[a], trial.stack[a] * f.tile.extent[a]);
        }
        // What the busiest thread does, and a little for tasks that do not all take as long.
        const double threads = plan.threads, all = static_cast<double>(tasks);
        const double cost = rows * (std::ceil(all / threads) + kUneven) * threads / all;
        if (cost >= least) continue;
        for (std::size_t moving = outer; moving < std::max<std::size_t>(outer + 1, 2); ++moving) {
          double ring = 1;
          for (std::size_t a = outer; a < 3; ++a) {
            ring *= largest_hull(list, static_cast<int>(a), (a == moving ? 1 : trial.stack[a]) * f.tile.extent[a]);
          }
          if (ring > budget) continue;
          least = cost;
          trial.pack_keys = static_cast<int>(ring);
          trial.roll_axis = static_cast<int>(moving);
          f = trial;
          break;
        }
      }
    }
  }
  return f.roll_axis >= 0;
}

/// Stacks share packed keys: first the heads of a group, whose keys are the same, then neighbours on the axis where that
/// adds fewest keys. They grow while there are tasks enough for the threads to share.
void choose_stack(const Plan& plan, ForwardPlan& f, const geometry::Grid& grid, const Position& tiles,
                  std::int64_t cells, std::int64_t enough) {
  const Problem& p = plan.problem;
  f.pack_keys = packed_keys(packed_bytes(p), kPackBytes, f.chunk_keys);
  const int head_tiles = geometry::ceil_div(static_cast<int>(p.heads / p.heads_kv), f.tile.heads);
  const std::size_t state_bytes =
      (round_up(static_cast<std::size_t>(p.head_dim), 4) + round_up(static_cast<std::size_t>(p.head_dim_v), 4)) *
      static_cast<std::size_t>(f.tile.rows) * element_bytes(p.dtype);
  const int most = std::min({kMaxStack, 512 / f.tile.rows, static_cast<int>(kStateBytes / state_bytes)});
  for (int stacked = 1; 2 * stacked <= most && forward_tasks(p, f, tiles, cells) / 2 >= enough; stacked *= 2) {
    if (f.stack_heads < head_tiles) {
      f.stack_heads *= 2;
      continue;
    }
    int grow = -1;
    double least = 0;
    for (int a = 0; a < geometry::kRank; ++a) {
      const auto n = static_cast<std::size_t>(a);
      if (f.stack[n] >= tiles[n]) continue;
      const double now = middle_hull(grid.axis[a], f.stack[n] * f.tile.extent[n]);
      const double growth = middle_hull(grid.axis[a], 2 * f.stack[n] * f.tile.extent[n]) / now;
      if (grow < 0 || growth < least) {
        grow = a;
        least = growth;
      }
    }
    if (grow < 0) break;
    f.stack[static_cast<std::size_t>(grow)] *= 2;
  }
}

}  // namespace

void plan_forward(Plan& plan, const Scored& best, const std::vector<Family>& list, const geometry::Grid& grid,
                  std::int64_t cells) {
  const Problem& p = plan.problem;
  ForwardPlan& f = plan.forward;
  f.tile = best.tile;
  f.chunk_keys = std::max(kChunkBytes / (f.tile.rows * static_cast<int>(element_bytes(p.dtype))), 64);
  Position tiles{};
  for (std::size_t a = 0; a < 3; ++a) tiles[a] = geometry::ceil_div(grid.axis[a].queries, f.tile.extent[a]);
  const std::int64_t enough = plan.threads > 1 ? std::int64_t{8} * plan.threads : 1;
  if (!choose_rolling(plan, f, list, grid, tiles, cells)) choose_stack(plan, f, grid, tiles, cells, enough);
  double stacks = 0;
  for (const Family& family : list) {
    stacks += family.sum([&](int a, const geometry::Axis& axis) {
      const auto n = static_cast<std::size_t>(a);
      return static_cast<double>(geometry::ceil_div(geometry::ceil_div(axis.queries, f.tile.extent[n]), f.stack[n]));
    });
  }
  const int head_tiles = geometry::ceil_div(static_cast<int>(p.heads / p.heads_kv), f.tile.heads);
  f.tasks = static_cast<std::int64_t>(stacks) * p.heads_kv * geometry::ceil_div(head_tiles, f.stack_heads);
  f.scratch_bytes = ForwardLayout(p, f).bytes;
  if (f.roll_axis >= 0) f.fold_axis = best.fold_axis;  // elsewhere a box of packed keys may cut windows
  f.work = {plan.mask_pairs, f.roll_axis >= 0 ? best.folded_pairs : best.pairs};
}

}  // namespace vicus::cpu
