// Tiles of causal attention differ in length. Blocks of the forward pass stay on their multiprocessor, and a tile's block is settled
// by the order of the tiles: here is which order leaves none with much more than the others. Other blocks come as
// some end, the longest first.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/families.h"
#include "gpu/planner.h"
#include "gpu/sm90_args.h"
#include "gpu/sm90_shapes.h"
#include "gpu/spec.h"

namespace vicus::gpu {
namespace {

// So many tiles of a head are computed at a time, where that can be, and read the same keys.
constexpr int kTilesAtATime = 12;
// Of gradients, heads that take turns: as many as one wave of blocks has, this many at least, unless what their blocks load
// and add to is more than the second cache keeps. Blocks that take the heads of a group one after the other are soon at
// several heads: at so many of four or more.
constexpr int kGradientHeads = 4;
constexpr double kGradientBytes = 40e6, kHeadsApart = 2;
// Of few blocks all begin at about the same time and stay together, unless they load and add to more than this. Others lose
// each other; where they add to sums of dQ, most if they take the heads of a group together, but for short head dims.
constexpr int kFewWaves = 3, kShortHeadDims = 128;
constexpr double kInsideBytes = 70e6;
// Of windows: keys of more heads would not stay in the second cache.
constexpr int kWindowHeads = 2;
// Keys and values of more heads than usual may take this much of the second cache.
constexpr double kCachedBytes = 24e6;
constexpr int kMostHeads = 64;  // that are considered
constexpr std::size_t kFewTiles =
    6;  // of fewer, keys are read about once: memory is what they wait for, and any order is as good
constexpr double kMostRounds = 32;  // of more, all orders are about even
// A difference that does not count: of more heads, more blocks begin to load at the same time.
constexpr double kEven = 0.015;

// The work of the busiest of `blocks`, as a multiple of the mean. `costs` are of the tiles of a head, the longest first.
double busiest(const std::vector<double>& costs, int heads, int turns, int blocks) {
  TileOrder order;
  order.all = Divisor(static_cast<int>(costs.size()));
  order.take_turns(heads, turns);
  const int tiles = heads * static_cast<int>(costs.size());
  double most = 0, all = 0;
  for (int block = 0; block < blocks; ++block) {
    double work = 0;
    for (int round = 0; round * blocks < tiles; ++round) {
      const int n = tile_of_round(round, block, blocks);
      if (n < tiles) work += costs.at(static_cast<std::size_t>(order.all.remainder(order.nth(n))));
    }
    most = std::max(most, work);
    all += work;
  }
  return all > 0 ? most * blocks / all : 1;
}

int of_forward(const Plan& plan, int blocks) {
  const Problem& p = plan.problem;
  const GpuKernelPlan& k = plan.gpu.forward;
  const int usual = std::max(blocks / kTilesAtATime, 1);
  const std::vector<Family> list = families(p);
  const bool alike = list.size() == 1 && list[0].axes[2].size() == 1;  // sequences
  if (!alike || std::get<Dense>(p.mask).packed() || k.key_parts > 1) return usual;
  const geometry::Axis& axis = list[0].axes[2][0].axis;
  const int rows = k.tile.extent[2], columns = k.kv_tile[2];
  std::vector<double> costs;
  for (int q = (axis.queries - 1) / rows * rows; q >= 0; q -= rows) {
    const geometry::Span keys = geometry::hull(axis, {q, std::min(q + rows, axis.queries)});
    costs.push_back(kInTurn.rows + (columns + kInTurn.tile) * geometry::ceil_div(keys.size(), columns));
  }
  const std::int64_t group = p.heads / p.heads_kv, of_group = geometry::ceil_div(static_cast<int>(group), k.tile.heads);
  const std::int64_t heads = p.batch * p.heads_kv * of_group;
  const double rounds = static_cast<double>(heads) * static_cast<double>(costs.size()) / blocks;
  if (costs.size() < kFewTiles || heads == 0 || rounds > kMostRounds) return usual;
  const double bytes = static_cast<double>(p.keys() * (p.head_dim + p.head_dim_v)) * 2 / static_cast<double>(of_group);
  const int most = std::max(usual, static_cast<int>(std::min<double>(kMostHeads, kCachedBytes / std::max(bytes, 1.0))));
  std::vector<double> busy;
  for (int turns = 1; turns <= std::max<std::int64_t>(std::min<std::int64_t>(most, heads), 1); ++turns) {
    busy.push_back(busiest(costs, static_cast<int>(heads), turns, blocks));
  }
  const double enough = *std::min_element(busy.begin(), busy.end()) + kEven;
  const auto usually = static_cast<std::size_t>(std::min<std::int64_t>(usual, heads)) - 1;
  if (busy.at(usually) <= enough) return usual;
  const auto even = [&](double b) { return b <= enough; };
  return static_cast<int>(std::find_if(busy.begin(), busy.end(), even) - busy.begin()) + 1;
}

double places_of(const Plan& plan, const GpuKernelPlan& k) {
  return std::max(plan.gpu.device.multiprocessors, 1) * std::max(k.blocks_per_multiprocessor, 1);
}

bool few_blocks(const Plan& plan, const GpuKernelPlan& k) {
  return static_cast<double>(k.blocks * k.key_parts) <= kFewWaves * places_of(plan, k);
}

// What blocks of the gradients load of a head, and add to: keys and values, or queries, their gradients and, in twice the
// bytes, sums of dQ.
double head_bytes(const Problem& p, bool of_keys, bool adds) {
  const auto width = static_cast<double>(p.head_dim + p.head_dim_v + (of_keys && adds ? 2 * p.head_dim : 0));
  return static_cast<double>(of_keys ? p.queries() : p.keys()) * width * 2;
}

// Query heads that a block of keys takes.
double heads_of_block(const Problem& p, const GpuKernelPlan& keys) {
  return static_cast<double>(p.heads / p.heads_kv / keys.key_parts);
}

int of_others(const Plan& plan, const Spec& spec) {
  const Problem& p = plan.problem;
  const GpuGradientPlan& g = plan.gpu.backward;
  const bool of_keys = has_boxes_of_keys(spec.kernel) || owns_keys(spec.kernel);
  const GpuKernelPlan& k = of_keys ? g.keys : spec.kernel == Kernel::forward ? plan.gpu.forward : g.queries;
  const double heads = static_cast<double>(p.batch * (of_keys ? p.heads_kv : p.heads));
  const double tiles = std::max(static_cast<double>(k.blocks) / std::max(heads, 1.0), 1.0);  // of a head
  const int most = std::max(static_cast<int>(places_of(plan, k) / tiles), kGradientHeads);
  const double of_block = of_keys ? heads_of_block(p, k) : 1;
  const bool inside = k.heads_inside && of_block > 1;
  if (few_blocks(plan, k) && (inside || of_block == 1)) return most;
  const double met = inside ? of_block : std::clamp(of_block / 2, 1.0, kHeadsApart);
  const double bytes = std::max(met * head_bytes(p, of_keys, g.add_queries), 1.0);
  return std::clamp(static_cast<int>((inside ? kInsideBytes : kGradientBytes) / bytes), 1, most);
}

}  // namespace

bool heads_inside(const Plan& plan, const GpuKernelPlan& keys, bool adds) {
  const Problem& p = plan.problem;
  const double heads = heads_of_block(p, keys), bytes = head_bytes(p, true, adds);
  if (heads == 1 || !std::holds_alternative<Dense>(p.mask)) return true;
  const Spec spec = spec_of(plan, Kernel::sm90_keys, false, true, DType::float32);
  if (spec.packed || !spec.uneven()) return true;  // blocks are alike, or their places apart
  const bool together = few_blocks(plan, keys) || !adds || p.head_dim + p.head_dim_v <= kShortHeadDims;
  return together && heads * bytes <= kInsideBytes;
}

int heads_in_turns(const Plan& plan, Kernel kernel) {
  const Spec spec = spec_of(plan, kernel, false, true, DType::float32);
  if (!spec.uneven() || spec.crowd()) return 1;
  const int blocks = std::max(plan.gpu.device.multiprocessors, 1);
  const bool forward = kernel == Kernel::sm90_forward;
  if (!spec.dense) return forward ? kWindowHeads : 1;
  if (forward) return of_forward(plan, blocks);
  return spec.packed ? 1 : of_others(plan, spec);  // places of packed sequences are in no order of length
}

}  // namespace vicus::gpu
