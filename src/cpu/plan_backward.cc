// Segments of query tiles and blocks of keys.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <variant>

#include "cpu/backward.h"
#include "cpu/planner_parts.h"
#include "cpu/tiles.h"

namespace vicus::cpu {
namespace {

/// Bytes of packed keys, values and their gradients of one key block.
constexpr std::size_t kBlockBytes = 512 << 10;
/// Bytes of dQ sums of one segment.
constexpr double kSegmentBytes = 3.2 * (1 << 20);
/// Bytes of all scratch of a thread that a plan aims at, which with what else a call touches stay below 4 MiB, and the fewest
/// keys of a block for it.
constexpr std::size_t kScratchBytes = 3712 << 10;
constexpr int kLeastBlockKeys = 128;

/// Blocks that a relay cuts the keys into, and the fewest keys of one.
constexpr int kRelayBlocks = 64, kLeastRelayKeys = 64;
/// What a segment of a relay costs besides its pairs, in queries: it packs all keys, and takes and gives back their sums.
constexpr double kRelayQueries = 20;

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

/// Key blocks of one axis whose gradients segments sum: how many, and their share of the pairs.
struct Interior {
  double blocks = 0, all_blocks = 0, pairs = 0, all_pairs = 0;
};
Interior interior(const geometry::Axis& axis, int kv_block, int segment_queries, bool relay) {
  Interior n;
  for (int k = 0; k < axis.keys; k += kv_block) {
    const Span block = {k, geometry::lo(k + kv_block, axis.keys)};
    const Span seen_by = geometry::queries_of(axis, block);
    const double pairs = static_cast<double>(block.size()) * seen_by.size();
    const bool inside = in_segments(seen_by, segment_queries, relay);
    n.all_blocks += 1;
    n.all_pairs += pairs;
    n.blocks += inside ? 1 : 0;
    n.pairs += inside ? pairs : 0;
  }
  return n;
}

/// Share of pairs in key blocks whose gradients segments sum, for the largest cell.
double interior_share(const geometry::Grid& grid, const BackwardPlan& b, int head_tiles) {
  double share = b.segment_heads < head_tiles ? 0 : 1;
  for (std::size_t a = 0; a < 3; ++a) {
    const Interior n = interior(grid.axis[a], b.kv_block[a], b.segment[a] * b.tile.extent[a], b.relay);
    share *= n.all_pairs > 0 ? n.pairs / n.all_pairs : 1;
  }
  return share;
}

/// Whether segments can hand key blocks on: along one axis, as sums that the output holds exactly and, for the order of
/// sums to be that of one segment, of one tile of heads.
bool can_relay(const Problem& p, int head_tiles) {
  return p.rank() == 1 && (p.dtype == DType::float32 || p.dtype == DType::float64) && !p.rpb && head_tiles == 1;
}
/// Keys of a block that is handed on: few, for all threads but the first wait for their first one.
int relay_block(const geometry::Grid& grid) { return std::max(grid.axis[2].keys / kRelayBlocks, kLeastRelayKeys); }

/// What the busiest of `threads` does, relative to the mean, with `tasks` segments, `pieces` of each head. Those of a causal
/// mask do not take equally long.
double rounds_of(const Problem& p, double threads, double tasks, double pieces) {
  const auto* dense = std::get_if<Dense>(&p.mask);
  const bool uneven = pieces > 1 && dense != nullptr && dense->causal != Causal::none;
  return std::ceil(tasks / threads) * threads / tasks + (uneven ? threads / tasks : 0);
}

/// Products per pair, as the threads share them, with a relay of segments of so many queries, `tasks` in all: at first all
/// threads but one wait for a block.
double relay_cost(const geometry::Grid& grid, int queries, double threads, double tasks, double rounds) {
  const double blocks = std::max(1, grid.axis[2].keys / relay_block(grid));
  return 5 * (rounds + (threads - 1) / blocks * threads / tasks) * (1 + kRelayQueries / queries);
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
    double pieces = 1;
    for (std::size_t a = 0; a < 3; ++a) pieces *= geometry::ceil_div(tiles[a], cut[a]);
    const double tasks = pieces * static_cast<double>(cells * p.heads_kv);
    const double rounds = rounds_of(p, plan.threads, tasks, pieces);
    const double share = interior_share(grid, trial, head_tiles);
    double cost = (3 + 2 * share) * rounds + 4 * (1 - share);
    const double relayed = can_relay(p, head_tiles)
                               ? relay_cost(grid, cut[2] * b.tile.extent[2], plan.threads, tasks, rounds)
                               : std::numeric_limits<double>::infinity();
    const bool relay = share < 1 && relayed < cost;
    if (relay) cost = relayed;
    const double measure = fits ? cost : bytes * 1e3;  // nothing fits: the smallest
    if (measure < best || (fits && !any_fits)) {
      best = measure;
      chosen = cut;
      b.relay = relay && fits;
    }
    any_fits = any_fits || fits;
  }
  b.segment = chosen;
  // One tile of very many heads may still be too much: then the group is cut, and every key block is a border block.
  if (!any_fits) b.segment_heads = std::max(static_cast<int>(kSegmentBytes / (best * 1e-3 / head_tiles)), 1);
}

/// Of the pairs of whole hulls, those that are left where windows are folded.
double folded_share(const BackwardPlan& b, const std::vector<Family>& list) {
  if (b.fold_axis < 0) return 1;
  double whole = 0, folded = 0;
  for (const Family& family : list) {
    const auto pairs = [&](int fold_axis) {
      return family.sum([&](int a, const geometry::Axis& axis) {
        const int extent = b.tile.extent[static_cast<std::size_t>(a)];
        return a == fold_axis ? folded_pairs(axis, extent, b.kv_block[static_cast<std::size_t>(a)])
                              : static_cast<double>(geometry::tile_pairs(axis, extent, 1));
      });
    };
    whole += pairs(-1);
    folded += pairs(b.fold_axis);
  }
  return whole > 0 ? folded / whole : 1;
}

}  // namespace

void plan_backward(Plan& plan, const Scored& best, const std::vector<Family>& list, const geometry::Grid& grid,
                   std::int64_t cells) {
  const Problem& p = plan.problem;
  const std::size_t element = element_bytes(p.dtype);
  BackwardPlan& b = plan.backward;
  b.tile = best.tile;
  b.chunk_keys = std::max(kChunkBytes / 2 / (b.tile.rows * static_cast<int>(element)), 64);
  const auto width = static_cast<std::size_t>(blocks(p.head_dim) + blocks(p.head_dim_v)) * kBlock;
  int most = std::min(packed_keys(2 * width * element, kBlockBytes, 64), 512);
  do {  // long segments leave less for a key block
    b.kv_block = block_extent(grid, b.tile, most);
    choose_segments(plan, b, grid, cells);
    most /= 2;
  } while (most >= kLeastBlockKeys && BackwardLayout(p, b, segment_tile_count(b)).bytes > kScratchBytes);
  if (b.relay) b.kv_block[2] = even_extent(grid.axis[2].keys, std::min(b.kv_block[2], relay_block(grid)));
  double segments = 0, blocks_in = 0, blocks_all = 0;
  for (const Family& family : list) {
    segments += family.sum([&](int a, const geometry::Axis& axis) {
      const auto n = static_cast<std::size_t>(a);
      return static_cast<double>(geometry::ceil_div(geometry::ceil_div(axis.queries, b.tile.extent[n]), b.segment[n]));
    });
    const auto count = [&](bool inside) {
      return family.sum([&](int a, const geometry::Axis& axis) {
        const auto n = static_cast<std::size_t>(a);
        const Interior i = interior(axis, b.kv_block[n], b.segment[n] * b.tile.extent[n], b.relay);
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
  b.keep_queries = true;
  b.scratch_bytes = BackwardLayout(p, b, segment_tile_count(b)).bytes;
  if (b.scratch_bytes > kScratchBytes) {
    b.keep_queries = false;
    b.scratch_bytes = BackwardLayout(p, b, segment_tile_count(b)).bytes;
  }
  const double share = list.empty() ? 1 : interior_share(grid, b, head_tiles);
  b.fold_axis = best.fold_axis;
  b.work = {plan.mask_pairs, best.pairs * folded_share(b, list) * (1 + 0.4 * (1 - share))};
}

}  // namespace vicus::cpu
