// The search for tiles. Costs are cycles of one core, estimated from exact counts of work; the constants were fitted to
// measurements on an AVX-512 core (see notes/cpu.md) and only their ratios matter.
#include "cpu/planner.h"

#include <algorithm>
#include <array>
#include <map>
#include <vector>

#include "core/domain.h"
#include "core/families.h"
#include "cpu/forward.h"
#include "cpu/layout.h"
#include "cpu/planner_parts.h"
#include "cpu/tiles.h"
#include "vicus/error.h"

namespace vicus::cpu {
namespace {

constexpr std::array kRowCounts = {16, 32, 64};
constexpr std::size_t kMaxCandidates = 12;

struct Cost {
  double pair;  ///< per (padded row, key)
  double key;   ///< per packed key, shared by a stack
  double tile;  ///< per tile
};

// Products run at one multiply-add per lane and half cycle; few rows keep the load ports busier than the arithmetic.
Cost cost_of(const Problem& p, int rows) {
  const double lanes = p.dtype == DType::float64 ? 8 : 16;
  const double products = static_cast<double>(p.head_dim + p.head_dim_v) / 2;
  const double slowdown = rows == 16 ? 1.25 : rows == 32 ? 1.12 : 1.1;
  const double rowwise = static_cast<double>(p.head_dim + p.head_dim_v) / lanes;
  return {.pair = (products * slowdown + 9) / lanes, .key = 2.5 * rowwise + 4, .tile = 400 + 6 * rowwise * rows};
}

/// What a pair of lanes and a shared row of scores costs more than one with a single key, as a share of the latter.
constexpr double kFoldCost = 0.34;

/// Whether tiles of kFoldRows can fold windows. A bias is added key by key; with additional tokens there is no ring, which
/// the forward pass needs for it.
bool may_fold(const Problem& p) {
  return !p.dense() && !p.rpb && p.additional_tokens == 0 && p.dtype != DType::float64 && folds_f32();
}

/// Per axis and tile extent, computed once: exact pairs of tiles with their hulls.
class AxisSums {
 public:
  explicit AxisSums(const std::vector<Family>& list) : families_(list) {}

  double pairs(const Position& extent, int fold_axis = -1) {
    double total = 0;
    for (std::size_t f = 0; f < families_.size(); ++f) {
      double product = families_[f].cells;
      for (int a = 0; a < geometry::kRank; ++a)
        product *= axis(f, a, extent[static_cast<std::size_t>(a)], a == fold_axis);
      total += product;
    }
    return total;
  }
  double tiles(const Position& extent) const {
    double total = 0;
    for (const Family& family : families_) {
      total += family.sum([&](int a, const geometry::Axis& axis) {
        return static_cast<double>(geometry::ceil_div(axis.queries, extent[static_cast<std::size_t>(a)]));
      });
    }
    return total;
  }

 private:
  double axis(std::size_t family, int a, int extent, bool folded) {
    const auto [place, added] = known_.try_emplace({family, a, extent, folded}, 0.0);
    if (added) {
      for (const auto& c : families_[family].axes[static_cast<std::size_t>(a)]) {
        place->second += c.count * (folded ? folded_pairs(c.axis, extent, c.axis.keys)
                                           : static_cast<double>(geometry::tile_pairs(c.axis, extent, 1)));
      }
    }
    return place->second;
  }

  const std::vector<Family>& families_;
  std::map<std::tuple<std::size_t, int, int, bool>, double> known_;
};

/// The largest cell, axis by axis: what extents and task counts are made for.
geometry::Grid largest(const std::vector<Family>& list) {
  geometry::Grid grid;
  for (int a = 0; a < geometry::kRank; ++a) {
    geometry::Axis& best = grid.axis[a];
    best.queries = best.keys = 0;
    for (const Family& family : list) {
      for (const auto& c : family.axes[static_cast<std::size_t>(a)]) {
        const bool longer =
            c.axis.queries > best.queries || (c.axis.queries == best.queries && c.axis.keys > best.keys);
        if (longer) best = c.axis;
      }
    }
  }
  return grid;
}

int tile_heads(int rows, int positions, int group) { return std::clamp(rows / positions, 1, group); }

Scored score(const Problem& p, AxisSums& sums, const QueryTile& tile, const geometry::Grid& grid) {
  const int group = static_cast<int>(p.heads / p.heads_kv);
  const int positions = tile.extent[0] * tile.extent[1] * tile.extent[2];
  const double head_tiles = static_cast<double>(p.heads_kv) * geometry::ceil_div(group, tile.heads);
  const double tiles = sums.tiles(tile.extent) * head_tiles;
  const Cost cost = cost_of(p, tile.rows);
  Scored s;
  s.tile = tile;
  const double lanes = static_cast<double>(tile.rows) / positions * head_tiles;
  s.pairs = sums.pairs(tile.extent) * lanes + tiles * tile.rows * static_cast<double>(p.additional_tokens);
  s.folded_pairs = s.pairs;
  if (tile.rows == kFoldRows && tile.extent[2] % kFoldLanes == 0 && may_fold(p)) {
    for (int a = 0; a < geometry::kRank - 1; ++a) {
      const double folded = sums.pairs(tile.extent, a) * lanes;
      if (folded >= s.folded_pairs) continue;
      s.folded_pairs = folded;
      s.fold_axis = a;
    }
  }
  // Keys packed per tile, as a share of a stack of four along the outermost axis that has so many tiles.
  double hull = 1, stacked = 1;
  bool stack_placed = false;
  for (int a = 0; a < geometry::kRank; ++a) {
    const geometry::Axis& axis = grid.axis[a];
    const int e = tile.extent[static_cast<std::size_t>(a)];
    hull *= middle_hull(axis, e);
    const bool here = !stack_placed && axis.queries > e;
    stack_placed = stack_placed || here;
    stacked *= middle_hull(axis, here ? 4 * e : e);
  }
  const double packed = stack_placed ? std::min(stacked / 4, hull) : hull;
  s.cost =
      (s.folded_pairs + kFoldCost * (s.pairs - s.folded_pairs)) * cost.pair + tiles * (cost.tile + packed * cost.key);
  return s;
}

/// Extents worth trying on an axis of `len` positions: powers of two and the whole axis.
std::vector<int> extents(int len) {
  std::vector<int> list;
  for (int e = 1; e <= kMaxRows && e / 2 < len; e *= 2) list.push_back(std::min(e, len));
  if (len <= kMaxRows && list.back() != len) list.push_back(len);
  return list;
}

std::vector<Scored> search(const Problem& p, const PlanOptions& options, const geometry::Grid& grid, AxisSums& sums) {
  const int group = static_cast<int>(p.heads / p.heads_kv);
  std::vector<Scored> found;
  const auto consider = [&](int rows, const Position& extent) {
    const int positions = extent[0] * extent[1] * extent[2];
    if (positions > rows) return;
    const QueryTile tile = {rows, tile_heads(rows, positions, group), extent};
    found.push_back(score(p, sums, tile, grid));
  };
  for (const int rows : kRowCounts) {
    if (options.rows != 0 && options.rows != rows) continue;
    if (options.tile_q != std::array<int, 3>{}) {
      Position extent = options.tile_q;
      for (int& e : extent) e = std::max(e, 1);
      consider(rows, extent);
      continue;
    }
    std::array<std::vector<int>, 3> tried;
    for (std::size_t a = 0; a < 3; ++a) tried[a] = extents(std::max(grid.axis[a].queries, 1));
    for (const int i : tried[0]) {
      for (const int j : tried[1]) {
        for (const int k : tried[2]) {
          // Boxes that leave more than half of the rows empty come only from short grids.
          const bool could_grow =
              2 * i * j * k <= rows && (i < tried[0].back() || j < tried[1].back() || k < tried[2].back());
          if (!could_grow) consider(rows, {i, j, k});
        }
      }
    }
  }
  std::sort(found.begin(), found.end(), [](const Scored& a, const Scored& b) { return a.cost < b.cost; });
  return found;
}

}  // namespace

double folded_pairs(const geometry::Axis& axis, int extent, int kv_block) {
  double keys = 0;
  for (int q = 0; q < axis.queries; q += extent) {
    const Span queries = {q, geometry::lo(q + extent, axis.queries)};
    const Span hull = geometry::hull(axis, queries);
    for (int k = hull.begin / kv_block * kv_block; k < hull.end; k += kv_block) {
      const Span part = geometry::intersect(hull, {k, k + kv_block});
      int longest = 0;
      for (int p = queries.begin; p < queries.end; ++p) {
        longest = std::max(longest, geometry::intersect(geometry::window(axis, p), part).size());
      }
      keys += fold_period(part.size(), longest);
    }
  }
  return keys * extent;
}

double middle_hull(const geometry::Axis& axis, int extent) {
  const int begin = std::max((axis.queries - extent) / 2, 0);
  return std::max(geometry::hull(axis, {begin, geometry::lo(begin + extent, axis.queries)}).size(), 1);
}

int packed_keys(std::size_t bytes_per_key, std::size_t budget, int chunk) {
  return std::max(static_cast<int>(std::min<std::size_t>(budget / bytes_per_key, 1024)), chunk);
}

void plan_problem(Plan& plan, const PlanOptions& options) {
  const Problem& p = plan.problem;
  if (options.rows != 0 && std::find(kRowCounts.begin(), kRowCounts.end(), options.rows) == kRowCounts.end()) {
    throw InvalidArgument("rows", std::to_string(options.rows), "0, 16, 32, 64");
  }
  std::int64_t positions = 1;
  for (std::size_t a = 0; a < 3; ++a) {
    const int e = options.tile_q[a];
    const bool unused = static_cast<int>(a) < geometry::kRank - p.rank();
    if (e < 0 || e > kMaxRows || (unused && e > 1)) {
      throw InvalidArgument("tile_q[" + std::to_string(a) + "]", std::to_string(e),
                            unused ? "0 or 1: the problem has no such axis" : "0 to " + std::to_string(kMaxRows));
    }
    positions *= std::max(e, 1);
  }
  if (positions > (options.rows != 0 ? options.rows : kMaxRows)) {
    throw InvalidArgument("tile_q", std::to_string(positions) + " positions",
                          "at most rows, " + std::to_string(options.rows != 0 ? options.rows : kMaxRows));
  }
  const std::vector<Family> list = families(p);
  const geometry::Grid grid = largest(list);
  AxisSums sums(list);
  const std::vector<Scored> found = search(p, options, grid, sums);
  const std::int64_t cells = Domain(p).size();
  plan_forward(plan, found.front(), list, grid, cells);
  plan_backward(plan, found.front(), list, grid, cells);
  for (std::size_t i = 0; i < std::min(found.size(), kMaxCandidates); ++i) {
    plan.candidates.push_back(
        {found[i].tile, plan.mask_pairs > 0 ? found[i].folded_pairs / plan.mask_pairs : 1, found[i].cost});
  }
}

}  // namespace vicus::cpu
