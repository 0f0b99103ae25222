// The search for tiles. Costs are cycles of one core, estimated from exact counts of work; the constants were fitted to
// measurements on an AVX-512 core (see notes/cpu.md) and only their ratios matter.
#include "cpu/planner.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "core/domain.h"
#include "core/families.h"
#include "cpu/backward.h"
#include "cpu/tiles.h"
#include "vicus/error.h"

namespace vicus::cpu {
namespace {

constexpr std::array kRowCounts = {16, 32, 64};
/// Bytes of packed keys and values of one box: half of a small L2 cache.
constexpr std::size_t kPackBytes = 192 << 10;
/// Bytes of queries and sums of a stack of tiles: the other half.
constexpr std::size_t kStateBytes = 512 << 10;
/// Bytes of one chunk of scores.
constexpr int kChunkBytes = 16 << 10;
/// Bytes of packed keys, values and their gradients of one key block.
constexpr std::size_t kBlockBytes = 512 << 10;
/// Bytes of dQ sums of one segment: with the rest of the scratch it stays below 4 MiB for common sizes.
constexpr double kSegmentBytes = 3.2 * (1 << 20);
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

/// Per axis and tile extent, computed once: exact pairs of tiles with their hulls.
class AxisSums {
 public:
  explicit AxisSums(const std::vector<Family>& list) : families_(list) {}

  double pairs(const Position& extent) {
    double total = 0;
    for (std::size_t f = 0; f < families_.size(); ++f) {
      double product = families_[f].cells;
      for (int a = 0; a < geometry::kRank; ++a) product *= axis(f, a, extent[static_cast<std::size_t>(a)]);
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
  double axis(std::size_t family, int a, int extent) {
    const auto [place, added] = known_.try_emplace({family, a, extent}, 0.0);
    if (added) {
      for (const auto& c : families_[family].axes[static_cast<std::size_t>(a)]) {
        place->second += c.count * static_cast<double>(geometry::tile_pairs(c.axis, extent, 1));
      }
    }
    return place->second;
  }

  const std::vector<Family>& families_;
  std::map<std::tuple<std::size_t, int, int>, double> known_;
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

/// Keys that `extent` queries in the middle of an axis see.
double middle_hull(const geometry::Axis& axis, int extent) {
  const int begin = std::max((axis.queries - extent) / 2, 0);
  return std::max(geometry::hull(axis, {begin, geometry::lo(begin + extent, axis.queries)}).size(), 1);
}

struct Scored {
  QueryTile tile;
  double pairs = 0;  ///< padded, all heads
  double cost = 0;
};

int tile_heads(int rows, int positions, int group) { return std::clamp(rows / positions, 1, group); }

Scored score(const Problem& p, AxisSums& sums, const QueryTile& tile, const geometry::Grid& grid) {
  const int group = static_cast<int>(p.heads / p.heads_kv);
  const int positions = tile.extent[0] * tile.extent[1] * tile.extent[2];
  const double head_tiles = static_cast<double>(p.heads_kv) * geometry::ceil_div(group, tile.heads);
  const double tiles = sums.tiles(tile.extent) * head_tiles;
  const Cost cost = cost_of(p, tile.rows);
  Scored s;
  s.tile = tile;
  s.pairs = sums.pairs(tile.extent) / positions * tile.rows * head_tiles +
            tiles * tile.rows * static_cast<double>(p.additional_tokens);
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
  s.cost = s.pairs * cost.pair + tiles * (cost.tile + packed * cost.key);
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

int packed_keys(std::size_t bytes_per_key, std::size_t budget, int chunk) {
  return std::max(static_cast<int>(std::min<std::size_t>(budget / bytes_per_key, 1024)), chunk);
}

void plan_forward(Plan& plan, const Scored& best, const std::vector<Family>& list, const geometry::Grid& grid,
                  std::int64_t cells) {
  const Problem& p = plan.problem;
  const int group = static_cast<int>(p.heads / p.heads_kv);
  const std::size_t element = element_bytes(p.dtype);
  ForwardPlan& f = plan.forward;
  f.tile = best.tile;
  f.chunk_keys = std::max(kChunkBytes / (f.tile.rows * static_cast<int>(element)), 64);
  f.pack_keys = packed_keys(
      (static_cast<std::size_t>(blocks(p.head_dim)) * kBlock + round_up(static_cast<std::size_t>(p.head_dim_v), kPad)) *
          element,
      kPackBytes, f.chunk_keys);
  // Stacks share packed keys: first the heads of a group, whose keys are the same, then neighbours on the axis where that
  // adds fewest keys. They grow while there are tasks enough for the threads to share.
  const int head_tiles = geometry::ceil_div(group, f.tile.heads);
  Position tiles{};
  for (std::size_t a = 0; a < 3; ++a) tiles[a] = geometry::ceil_div(grid.axis[a].queries, f.tile.extent[a]);
  const auto tasks = [&] {
    std::int64_t n = cells * p.heads_kv * geometry::ceil_div(head_tiles, f.stack_heads);
    for (std::size_t a = 0; a < 3; ++a) n *= geometry::ceil_div(tiles[a], f.stack[a]);
    return n;
  };
  const std::int64_t enough = plan.threads > 1 ? std::int64_t{8} * plan.threads : 1;
  const std::size_t state_bytes =
      (round_up(static_cast<std::size_t>(p.head_dim), 4) + round_up(static_cast<std::size_t>(p.head_dim_v), 4)) *
      static_cast<std::size_t>(f.tile.rows) * element;
  const int most = std::min({kMaxStack, 512 / f.tile.rows, static_cast<int>(kStateBytes / state_bytes)});
  for (int stacked = 1; 2 * stacked <= most && tasks() / 2 >= enough; stacked *= 2) {
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
  double blocks = 0;
  for (const Family& family : list) {
    blocks += family.sum([&](int a, const geometry::Axis& axis) {
      const auto n = static_cast<std::size_t>(a);
      return static_cast<double>(geometry::ceil_div(geometry::ceil_div(axis.queries, f.tile.extent[n]), f.stack[n]));
    });
  }
  f.tasks = static_cast<std::int64_t>(blocks) * p.heads_kv * geometry::ceil_div(head_tiles, f.stack_heads);
  f.scratch_bytes = ForwardLayout(p, f).bytes;
  f.work = {plan.mask_pairs, best.pairs};
}

/// Extents of key blocks: grown on the axis where a tile's hull spans most blocks, so that few blocks are visited.
Position block_extent(const geometry::Grid& grid, const QueryTile& tile, int most) {
  Position e{1, 1, 1};
  std::array<double, 3> hull{};
  for (std::size_t a = 0; a < 3; ++a) {
    hull[a] = middle_hull(grid.axis[a], tile.extent[a]);
  }
  for (;;) {
    int grow = -1;
    for (int a = 0; a < 3; ++a) {
      const auto n = static_cast<std::size_t>(a);
      const int next = std::min(2 * e[n], std::max(grid.axis[a].keys, 1));
      if (next == e[n] || e[0] * e[1] * e[2] / e[n] * next > most) continue;
      if (grow < 0 || hull[n] / e[n] > hull[static_cast<std::size_t>(grow)] / e[static_cast<std::size_t>(grow)])
        grow = a;
    }
    if (grow < 0) break;
    int& g = e[static_cast<std::size_t>(grow)];
    g = std::min(2 * g, grid.axis[grow].keys);
  }
  for (std::size_t a = 0; a < 3; ++a) e[a] = even_extent(std::max(grid.axis[a].keys, 1), e[a]);
  return e;
}

/// Key blocks of one axis whose queries lie in one segment: how many, and their share of the pairs.
struct Interior {
  double blocks = 0, all_blocks = 0, pairs = 0, all_pairs = 0;
};
Interior interior(const geometry::Axis& axis, int kv_block, int segment_queries) {
  Interior n;
  for (int k = 0; k < axis.keys; k += kv_block) {
    const Span block = {k, geometry::lo(k + kv_block, axis.keys)};
    const Span seen_by = geometry::queries_of(axis, block);
    const double pairs = static_cast<double>(block.size()) * seen_by.size();
    const bool inside = in_one_segment(seen_by, segment_queries);
    n.all_blocks += 1;
    n.all_pairs += pairs;
    n.blocks += inside ? 1 : 0;
    n.pairs += inside ? pairs : 0;
  }
  return n;
}

/// Share of pairs in key blocks that lie inside one segment, for the largest cell.
double interior_share(const geometry::Grid& grid, const BackwardPlan& b, int head_tiles) {
  double share = b.segment_heads < head_tiles ? 0 : 1;
  for (std::size_t a = 0; a < 3; ++a) {
    const Interior n = interior(grid.axis[a], b.kv_block[a], b.segment[a] * b.tile.extent[a]);
    share *= n.all_pairs > 0 ? n.pairs / n.all_pairs : 1;
  }
  return share;
}

/// Segments: the cut with the least time of all threads, 3 products per pair for dQ, 2 more inside, 4 more outside.
void choose_segments(const Plan& plan, BackwardPlan& b, const geometry::Grid& grid, std::int64_t cells) {
  const Problem& p = plan.problem;
  Position tiles{};
  for (std::size_t a = 0; a < 3; ++a)
    tiles[a] = std::max(geometry::ceil_div(grid.axis[a].queries, b.tile.extent[a]), 1);
  const double tile_bytes = static_cast<double>(round_up(static_cast<std::size_t>(p.head_dim), 4) *
                                                static_cast<std::size_t>(b.tile.rows) * element_bytes(p.dtype));
  double best = std::numeric_limits<double>::infinity();
  const int head_tiles = geometry::ceil_div(static_cast<int>(p.heads / p.heads_kv), b.tile.heads);
  BackwardPlan trial = b;
  trial.segment_heads = b.segment_heads = head_tiles;
  Position chosen = {1, 1, 1};
  // Cut the outermost axis first; an inner one only when single layers of the outer one are still too much.
  std::vector<Position> cuts;
  for (std::size_t a = 0; a < 3; ++a) {
    Position cut = tiles;
    for (std::size_t outer = 0; outer < a; ++outer) cut[outer] = 1;
    for (int pieces = 1; pieces <= tiles[a]; pieces = pieces < 4 ? pieces + 1 : pieces + pieces / 2) {
      cut[a] = geometry::ceil_div(tiles[a], pieces);
      cuts.push_back(cut);
    }
    cut[a] = 1;
    cuts.push_back(cut);
  }
  bool any_fits = false;
  for (const Position& cut : cuts) {
    trial.segment = cut;
    const double bytes = static_cast<double>(segment_tile_count(trial)) * tile_bytes;
    const bool fits = bytes <= kSegmentBytes;
    if (any_fits && !fits) continue;
    double tasks = static_cast<double>(cells * p.heads_kv);
    for (std::size_t a = 0; a < 3; ++a) tasks *= geometry::ceil_div(tiles[a], cut[a]);
    const double rounds = std::ceil(tasks / plan.threads) * plan.threads / tasks;
    const double share = interior_share(grid, trial, head_tiles);
    const double cost = (3 + 2 * share) * rounds + 4 * (1 - share);
    const double measure = fits ? cost : bytes * 1e3;  // nothing fits: the smallest
    if (measure < best || (fits && !any_fits)) {
      best = measure;
      chosen = cut;
    }
    any_fits = any_fits || fits;
  }
  b.segment = chosen;
  // One tile of very many heads may still be too much: then the group is cut, and every key block is a border block.
  if (!any_fits) b.segment_heads = std::max(static_cast<int>(kSegmentBytes / (best * 1e-3 / head_tiles)), 1);
}

void plan_backward(Plan& plan, const Scored& best, const std::vector<Family>& list, const geometry::Grid& grid,
                   std::int64_t cells) {
  const Problem& p = plan.problem;
  const std::size_t element = element_bytes(p.dtype);
  BackwardPlan& b = plan.backward;
  b.tile = best.tile;
  b.chunk_keys = std::max(kChunkBytes / 2 / (b.tile.rows * static_cast<int>(element)), 64);
  const auto width = static_cast<std::size_t>(blocks(p.head_dim) + blocks(p.head_dim_v)) * kBlock;
  const int most = packed_keys(2 * width * element, kBlockBytes, 64);
  b.kv_block = block_extent(grid, b.tile, std::min(most, 512));
  choose_segments(plan, b, grid, cells);
  double segments = 0, blocks_in = 0, blocks_all = 0;
  for (const Family& family : list) {
    segments += family.sum([&](int a, const geometry::Axis& axis) {
      const auto n = static_cast<std::size_t>(a);
      return static_cast<double>(geometry::ceil_div(geometry::ceil_div(axis.queries, b.tile.extent[n]), b.segment[n]));
    });
    const auto count = [&](bool inside) {
      return family.sum([&](int a, const geometry::Axis& axis) {
        const auto n = static_cast<std::size_t>(a);
        const Interior i = interior(axis, b.kv_block[n], b.segment[n] * b.tile.extent[n]);
        return inside ? i.blocks : i.all_blocks;
      });
    };
    blocks_in += count(true);
    blocks_all += count(false);
  }
  const auto heads_kv = static_cast<double>(p.heads_kv);
  const int head_tiles = geometry::ceil_div(static_cast<int>(p.heads / p.heads_kv), b.tile.heads);
  const int head_pieces = geometry::ceil_div(head_tiles, b.segment_heads);
  if (head_pieces > 1) blocks_in = 0;
  b.segments = static_cast<std::int64_t>(segments * heads_kv * head_pieces);
  b.border_blocks = static_cast<std::int64_t>((blocks_all - blocks_in) * heads_kv);
  b.scratch_bytes = BackwardLayout(p, b, segment_tile_count(b)).bytes;
  const double share = list.empty() ? 1 : interior_share(grid, b, head_tiles);
  b.work = {plan.mask_pairs, best.pairs * (1 + 0.4 * (1 - share))};
}

}  // namespace

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
        {found[i].tile, plan.mask_pairs > 0 ? found[i].pairs / plan.mask_pairs : 1, found[i].cost});
  }
}

}  // namespace vicus::cpu
