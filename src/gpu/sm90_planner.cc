// Tiles of the kernels by boxes and warpgroups (engine sm90). Every warpgroup has a box of 64 queries; what it computes of
// a key tile is nothing, all without a mask, or all with one. These are counted exactly, axis by axis: a box sees a tile
// when every axis does. Gradients of keys have boxes of keys instead, and meet tiles of queries: windows are alike from both
// sides, and are counted as if those were keys. Costs were fitted to measurements on an H100 (notes/sm90.md).
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "core/families.h"
#include "gpu/box_counts.h"
#include "gpu/planner.h"
#include "gpu/sm90_args.h"
#include "gpu/sm90_shapes.h"
#include "gpu/spec.h"

namespace vicus::gpu {
namespace {

constexpr int kRows = 64;  // of a warpgroup
constexpr int kMostHeadDim = 256, kUnit = 8;
constexpr Costs kInCrowd = {69, 0, 134, 1, 1};
constexpr Costs kGradientsInTurn = {42, 10, 300, 1.35, 1}, kGradientsInCrowd = {42, 0, 222, 1, 1};
/// Of warpgroups beside each other along the last axis, forward: tiles follow each other along it, and longer ones share fewer
/// keys at a time.
constexpr double kSideBySide = 1.07;
/// Parts of the keys: at most so many; their merge takes as long as so many keys on every multiprocessor, and a byte of them
/// as long as so many keys on one.
constexpr int kMostParts = 128;
constexpr double kMergeKeys = 1450, kByteKeys = 1.0 / 150;
/// The same of parts of the query heads that meet a tile of keys, in columns of gradients.
constexpr double kMergeHeads = 500, kByteHeads = 1.0 / 200;
/// What each head after the first costs a block that takes them one after the other: a share of the work.
constexpr double kLaterHead = 0.025;
/// Parts take memory: more of them only where that takes less of the time than this.
constexpr double kWorthParts = 0.98;
/// Blocks whose longest has so many times the tiles of the mean differ in length.
constexpr double kUnevenBlocks = 1.3;
/// Pairs of tiles for each of the mask, up to which one kernel for all gradients is faster than two.
constexpr double kMostAdding = 2;

using Extent = std::array<int, 3>;

/// Boxes of exactly `volume` positions on the trailing `rank` axes.
std::vector<Extent> boxes_of(int rank, int volume) {
  std::vector<Extent> list;
  for (int i = 1; i <= (rank > 2 ? volume : 1); ++i) {
    if (volume % i != 0) continue;
    for (int j = 1; j <= (rank > 1 ? volume / i : 1); ++j) {
      if (volume / i % j == 0) list.push_back({i, j, volume / i / j});
    }
  }
  return list;
}

class BoxSearch {
 public:
  /// `adds`: of keys, whose kernel also sums dQ.
  BoxSearch(const Plan& plan, Kernel kernel, bool adds = false)
      : plan_(plan), p_(plan.problem), kernel_(kernel), adds_(adds) {
    if (const auto* mask = std::get_if<Neighborhood>(&p_.mask)) {
      for (int i = 0; i < p_.rank(); ++i) {
        dilation_.at(static_cast<std::size_t>(3 - p_.rank() + i)) = static_cast<int>(mask->dilation[i]);
      }
    }
    for (const Family& family : families_) {
      for (std::size_t a = 0; a < 3; ++a) {
        for (const auto& c : family.axes[a]) longest_[a] = std::max(longest_[a], c.axis.queries);
      }
    }
  }

  /// Only of tiles with these extents, where they are not zero.
  BoxPlan run(const Extent& tile_q, const Extent& tile_kv) {
    tile_q_ = tile_q;
    tile_kv_ = tile_kv;
    const std::int64_t width = std::max(p_.head_dim, p_.head_dim_v);
    const BoxShape* narrowest = nullptr;  // shapes for wider head dims would also do, but waste
    for (const BoxShape& shape : box_shapes(kernel_, adds_)) {
      if (width > shape.head_dim || p_.head_dim + p_.head_dim_v > shape.head_dims) continue;
      if (narrowest == nullptr) narrowest = &shape;
      if (shape.head_dim != narrowest->head_dim || shape.head_dims != narrowest->head_dims) continue;
      const int group = p_.rank() < 3 && kernel_ == Kernel::sm90_forward ? static_cast<int>(p_.heads / p_.heads_kv) : 1;
      for (int heads = 1; heads <= std::min(group, kRows); heads *= 2) {
        for (const Extent& box : boxes_of(p_.rank(), kRows / heads)) {
          // One warpgroup lies the same way along every axis.
          const int first = 3 - p_.rank(), past = shape.warpgroups > 1 ? 3 : first + 1;
          for (int axis = first; axis < past; ++axis) consider(shape, box, heads, axis);
        }
      }
    }
    std::stable_sort(found_.begin(), found_.end(), [](const auto& a, const auto& b) { return a.cost < b.cost; });
    BoxPlan plan;
    if (!found_.empty()) plan.best = found_.front().kernel;
    for (const Found& f : found_) {
      if (plan.candidates.size() == kShown) break;
      plan.candidates.push_back({f.kernel.tile, f.kernel.work.ratio(), f.cost, f.kernel.kv_tile, f.kernel.key_parts});
    }
    return plan;
  }

 private:
  static constexpr std::size_t kShown = 12;

  /// The best way to compute with one tile of queries.
  struct Found {
    GpuKernelPlan kernel;
    double cost = std::numeric_limits<double>::infinity();
  };

  [[nodiscard]] bool loadable(const Extent& box) const {
    const bool in_pieces = p_.rank() == 1 && kernel_ == Kernel::sm90_forward;  // lines
    for (std::size_t a = 0; a < 3 && !in_pieces; ++a) {
      if ((box[a] - 1) * dilation_[a] + 1 > kMostSpan) return false;
    }
    return true;
  }

  static bool wanted(const Extent& tile, const Extent& asked) { return asked == Extent{} || tile == with_ones(asked); }
  /// Leading axes that a problem lacks have one position.
  static Extent with_ones(Extent e) {
    for (int& n : e) n = std::max(n, 1);
    return e;
  }

  void consider(const BoxShape& shape, const Extent& box, int heads, int axis) {
    if (!loadable(box) || (shape.blocks > 1 && p_.rank() == 1)) return;
    // The last warpgroup would have no rows, where there are any.
    const int length = longest_.at(static_cast<std::size_t>(axis));
    const bool idle = length > 0 && (shape.warpgroups - 1) * box.at(static_cast<std::size_t>(axis)) >= length;
    if (idle && kernel_ == Kernel::sm90_forward && tile_q_ == Extent{}) return;
    GpuKernelPlan k;
    k.family = GpuKernels::warpgroups;
    k.warps = 4 * shape.warpgroups;
    k.row_blocks = 1;
    k.stages = shape.stages;
    k.second_stages = shape.second_stages;
    k.blocks_per_multiprocessor = shape.blocks;
    k.stack_axis = axis;
    k.ping_pong = shape.ping_pong;
    k.tile.rows = kRows * shape.warpgroups;
    k.tile.heads = heads;
    Extent rows = box;
    rows.at(static_cast<std::size_t>(axis)) *= shape.warpgroups;
    if (!wanted(rows, tile_q_)) return;
    const BoxCounts::Axes axes = counts_.of_rows(rows, axis, shape.warpgroups);
    const double row_tiles = tiles(rows);
    Found found;
    // The kernel for dK and dV has dS of whole slabs; those for one of them do not.
    const int step = of_keys() && shape.second_stages == 0 && shape.blocks == 1 ? 32 : 16;
    for (int count = shape.most_columns; count >= shape.least_columns; count -= step) {
      for (const Extent& columns : boxes(count)) {
        if (!loadable(columns) || !wanted(columns, tile_kv_)) continue;
        k.tile.extent = of_keys() ? columns : rows;
        k.kv_tile = of_keys() ? rows : columns;
        consider(shape, k, counts_.total(axes, columns), row_tiles, columns, found);
      }
    }
    if (found.kernel.tile.rows > 0) found_.push_back(found);
  }

  [[nodiscard]] bool of_keys() const { return has_boxes_of_keys(kernel_); }

  void consider(const BoxShape& shape, GpuKernelPlan& k, const Counts& n, double row_tiles, const Extent& columns,
                Found& found) {
    const int count = columns[0] * columns[1] * columns[2];
    const std::int64_t group = p_.heads / p_.heads_kv;
    const double heads =
        static_cast<double>(p_.heads_kv) * std::ceil(static_cast<double>(group) / k.tile.heads);  // tiles along them
    const double blocks = row_tiles * (of_keys() ? static_cast<double>(p_.heads_kv) : heads);
    const double more = of_keys() ? 0 : std::ceil(static_cast<double>(p_.additional_tokens) / count);
    const double seen = n.seen * heads + blocks * more, masked = seen - n.whole * heads;
    const bool crowd = shape.blocks > 1;
    const bool forward = kernel_ == Kernel::sm90_forward;
    const Costs& costs = forward ? (crowd ? kInCrowd : kInTurn) : crowd ? kGradientsInCrowd : kGradientsInTurn;
    const double masked_cost = costs.masked * (columns[2] % 8 != 0 && 8 % columns[2] != 0 ? costs.awkward : 1);
    const double work =
        (seen + (masked_cost - 1) * masked) * (count + costs.tile) + (n.hull - n.seen) * heads * costs.skip;
    const bool side_by_side = forward && p_.rank() > 1 && shape.warpgroups > 1 && k.stack_axis == 2;
    const double slowness = shape.warpgroups * shape.slowness * (side_by_side ? kSideBySide : 1);
    const auto least_cost = [&](int parts) { return slowness * (work + blocks * parts * costs.rows); };
    // Not so of keys of several heads: `most` is of one.
    if (least_cost(1) >= found.cost && (!of_keys() || group == 1)) return;
    const double tiles_of_block = blocks > 0 ? (n.hull * heads / blocks) + more : 0;
    const double multiprocessors = std::max(plan_.gpu.device.multiprocessors, 1);
    const auto cost_of = [&](int parts) {
      const double waves = blocks * parts / (multiprocessors * shape.blocks);
      const double idle = waves > 0 ? std::ceil(waves) / waves : 1;  // multiprocessors in the last wave
      const double merge =
          parts == 1 ? 0 : multiprocessors * kMergeKeys + kByteKeys * static_cast<double>(parts_bytes(p_, parts));
      // Of one wave, the time is that of the longest block.
      const double tiles = waves <= 1 ? n.most + more : tiles_of_block;
      const bool even = tiles_of_block == 0 || (waves > 1 && parts == 1);
      const double longest = even ? 1 : std::ceil(tiles / parts) * parts / tiles_of_block;
      return slowness * idle * (longest * work + blocks * parts * costs.rows) + merge;
    };
    // Of keys: several blocks may share out the heads of a group. Long blocks come first.
    const auto cost_of_heads = [&](int parts) {
      k.key_parts = parts;
      const double later = static_cast<double>(group / parts - 1) * kLaterHead;
      const double slower = heads_inside(plan_, k, adds_) ? 1 : 1 + later;
      const double places = multiprocessors * shape.blocks, waves = blocks * parts / places;
      const double most = n.most * static_cast<double>(group);
      const bool uneven = most > kUnevenBlocks * tiles_of_block;
      const double idle = waves > 0 ? (uneven ? std::max(most / tiles_of_block, waves) : std::ceil(waves)) / waves : 1;
      const double merge =
          parts == 1 ? 0
                     : multiprocessors * kMergeHeads + kByteHeads * static_cast<double>(head_parts_bytes(p_, parts));
      return slowness * (slower * idle * work + blocks * parts * costs.rows) + merge;
    };
    const bool shared = of_keys() && group > 1;
    k.blocks = static_cast<std::int64_t>(blocks);
    double cost = shared ? cost_of_heads(1) : cost_of(1);
    int best = 1;
    const bool strict = plan_.backward.options.memory == MemoryPreference::strict;
    for (int parts = 2; shared && !crowd && !strict && parts <= group; ++parts) {
      const double cost_of_parts = group % parts == 0 ? cost_of_heads(parts) : cost;
      if (cost_of_parts >= kWorthParts * cost) continue;
      cost = cost_of_parts;
      best = parts;
    }
    k.key_parts = best;
    // Three warpgroups have too few registers for that with three axes.
    const bool divisible = forward && !crowd && (p_.rank() < 3 || shape.warpgroups < 3);
    const bool worthwhile = divisible && least_cost(2) + multiprocessors * kMergeKeys < cost;
    const int most_parts = worthwhile ? static_cast<int>(std::min<double>(kMostParts, tiles_of_block)) : 1;
    for (int parts = 2; parts <= most_parts; ++parts) {
      if (cost_of(parts) >= cost) continue;
      cost = cost_of(parts);
      k.key_parts = parts;
    }
    if (cost >= found.cost) return;
    Spec spec;
    spec.kernel = kernel_;
    spec.add_queries = adds_;
    spec.rank = p_.rank();
    spec.head_dim = static_cast<int>(p_.head_dim);
    spec.head_dim_v = static_cast<int>(p_.head_dim_v);
    set_tiles(spec, k);
    k.shared_bytes = shared_bytes(spec);
    // A block takes 1 KiB more of what a multiprocessor has.
    constexpr int kOfBlock = 1024;
    const int most = plan_.gpu.device.shared_bytes_per_block;
    if (shape.blocks * (k.shared_bytes + kOfBlock) > most + kOfBlock) return;
    found.cost = cost;
    k.work = {plan_.mask_pairs, seen * count * k.tile.rows};
    found.kernel = k;
  }

  const std::vector<Extent>& boxes(int volume) {
    const auto [place, added] = boxes_.try_emplace(volume);
    if (added) place->second = boxes_of(p_.rank(), volume);
    return place->second;
  }

  double tiles(const Extent& q) const {
    const auto of = [&](int a, const geometry::Axis& axis) {
      return static_cast<double>(geometry::ceil_div(axis.queries, q.at(static_cast<std::size_t>(a))));
    };
    double n = 0;
    for (const Family& family : families_) n += family.sum(of);
    return n;
  }

  const Plan& plan_;
  const Problem& p_;
  Kernel kernel_;
  bool adds_;
  std::vector<Family> families_ = families(p_);
  BoxCounts counts_{families_};
  Extent dilation_{1, 1, 1}, longest_{}, tile_q_{}, tile_kv_{};  // longest: axes of queries
  std::map<int, std::vector<Extent>> boxes_;
  std::vector<Found> found_;
};

/// Whether the kernel of keys can also sum dQ. Boxes of sums have no gaps, additional tokens have no sums; where rows of keys
/// are short and those of values are not, there are no registers for dV.
bool addable(const Problem& p) {
  const auto* mask = std::get_if<Neighborhood>(&p.mask);
  for (int i = 0; mask != nullptr && i < p.rank(); ++i) {
    if (mask->dilation[i] > 1) return false;
  }
  constexpr int kShort = 64;
  return p.additional_tokens == 0 && (p.head_dim > kShort || p.head_dim_v <= kShort);
}

std::string refuse(const char* name, std::int64_t got, const std::string& allowed) {
  return std::string("engine sm90 takes ") + name + " " + allowed + ", it is " + std::to_string(got);
}

}  // namespace

std::string supports_boxes(const Problem& p) {
  if (p.dtype != DType::bfloat16 && p.dtype != DType::float16) {
    return "engine sm90 computes bfloat16 and float16, dtype is " + std::string(dtype_name(p.dtype));
  }
  const std::string allowed = "in multiples of " + std::to_string(kUnit) + " up to " + std::to_string(kMostHeadDim);
  if (p.head_dim % kUnit != 0 || p.head_dim > kMostHeadDim) return refuse("head_dim", p.head_dim, allowed);
  if (p.head_dim_v % kUnit != 0 || p.head_dim_v > kMostHeadDim) return refuse("head_dim_v", p.head_dim_v, allowed);
  if (p.rpb || p.attn_bias) return "engine sm90 takes no rpb and no attn_bias";
  if (!(p.effective_scale() > 0)) return "engine sm90 takes scale > 0";
  if (const auto* mask = std::get_if<Neighborhood>(&p.mask)) {
    for (int i = 0; i < p.rank(); ++i) {
      if (mask->dilation[i] > kMostDilation) {
        return refuse("dilation", mask->dilation[i], "up to " + std::to_string(kMostDilation));
      }
    }
  }
  return "";
}

std::size_t parts_bytes(const Problem& p, int parts) {
  const auto rows = static_cast<std::size_t>(p.batch * p.queries() * p.heads * (parts > 1 ? parts : 0));
  return rows * static_cast<std::size_t>(p.head_dim_v + 1) * sizeof(float);
}

std::size_t head_parts_bytes(const Problem& p, int parts) {
  const auto rows = static_cast<std::size_t>(p.batch * p.keys() * p.heads_kv * (parts > 1 ? parts : 0));
  return rows * static_cast<std::size_t>(padded(p.head_dim) + padded(p.head_dim_v)) * sizeof(float);
}

double busy_pairs(const Plan& plan, const GpuKernelPlan& forward) {
  // Of short windows, calls are little more than the start of a kernel, whatever is idle.
  constexpr double kLong = 512;
  const auto rows = static_cast<double>(plan.problem.batch * plan.problem.queries() * plan.problem.heads);
  const double blocks = std::max(1.0, static_cast<double>(forward.blocks) * forward.key_parts);
  const double idle = plan.mask_pairs < kLong * rows ? 1 : plan.gpu.device.multiprocessors / blocks;
  return forward.work.tile_pairs * std::max(1.0, idle);
}

BoxPlan plan_boxes(const Plan& plan, const PlanOptions& options) {
  BoxPlan named = BoxSearch(plan, Kernel::sm90_forward).run(options.tile_q, options.tile_kv);
  return named.best.tile.rows > 0 ? named : BoxSearch(plan, Kernel::sm90_forward).run({}, {});
}

double gradient_products(const GpuGradientPlan& plan) {
  const bool apart = plan.values.tile.rows > 0;
  const double keys = plan.keys.work.tile_pairs,
               queries = (plan.add_queries ? plan.keys : plan.queries).work.tile_pairs;
  return (apart ? 3 * keys + 2 * plan.values.work.tile_pairs : 4 * keys) + 3 * queries;
}

GpuGradientPlan plan_box_gradients(const Plan& plan, bool asked) {
  const Problem& p = plan.problem;
  GpuGradientPlan gradients;
  // Additional tokens have a kernel with tensor cores, of engine sm80.
  const bool plain = plan.gpu.backward.keys.family == GpuKernels::plain;
  if (plain && p.additional_tokens > 0) return gradients;
  if (plan.backward.kv_splits_allowed > 1 && addable(p)) {
    gradients.keys = BoxSearch(plan, Kernel::sm90_keys, true).run({}, {}).best;
    // What is in padding may be NaN; it reaches sums of dQ, which are then made again row by row.
    const auto* const dense = std::get_if<Dense>(&p.mask);
    const bool faster = gradients.keys.work.ratio() <= kMostAdding && (dense == nullptr || !dense->padded());
    gradients.add_queries = gradients.keys.tile.rows > 0 && (asked || faster);
    if (gradients.add_queries) return gradients;
  }
  gradients.keys = BoxSearch(plan, Kernel::sm90_keys).run({}, {}).best;
  gradients.queries = BoxSearch(plan, Kernel::sm90_queries).run({}, {}).best;
  const bool apart = gradients.keys.second_stages > 0;
  if (apart) gradients.values = BoxSearch(plan, Kernel::sm90_values).run({}, {}).best;
  gradients.values.key_parts = gradients.keys.key_parts;
  if (gradients.queries.tile.rows == 0 || (apart && gradients.values.tile.rows == 0)) return {};
  return gradients;
}

}  // namespace vicus::gpu
