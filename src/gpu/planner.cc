// The search for tiles. Costs are relative; the constants were fitted to measurements on an H100 (notes/gpu.md).
#include "gpu/planner.h"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <tuple>
#include <vector>

#include "core/domain.h"
#include "core/families.h"
#include "gpu/spec.h"
#include "jit/device.h"
#include "vicus/error.h"

namespace vicus::gpu {
namespace {

/// A way to build the forward kernel, for head dims up to `head_dim`.
struct Shape {
  int head_dim, warps, row_blocks, stages, most_keys, blocks;  // blocks: per multiprocessor
  double slowness;                                             // time of a product, relative
};
constexpr Shape kShapes[] = {
    {64, 4, 2, 2, 64, 2, 1.0},  {64, 4, 1, 2, 64, 3, 1.2},  {128, 4, 2, 2, 32, 2, 1.0},
    {128, 4, 1, 2, 64, 2, 1.2}, {256, 4, 1, 2, 32, 1, 1.5},
};
constexpr int kMostHeadDim = 256;
/// Work besides products, in multiply-adds: of a pair (softmax, mask), of a key tile of 64 rows (waiting for it), of a
/// block (its start and end).
constexpr double kPairWork = 40, kTileWork = 1e5, kBlockWork = 5e5;

using Extent = std::array<int, 3>;

/// Boxes of at most `most` positions on the trailing `rank` axes, extents powers of two.
std::vector<Extent> query_boxes(int rank, int most) {
  std::vector<Extent> list;
  for (int i = 1; i <= (rank > 2 ? most : 1); i *= 2) {
    for (int j = 1; j <= (rank > 1 ? most / i : 1); j *= 2) list.push_back({i, j, most / (i * j)});
  }
  return list;
}

/// Boxes of keys: a multiple of 16, at most `most`, lines of at most 64.
std::vector<Extent> key_boxes(int rank, int most) {
  std::vector<Extent> list;
  if (rank == 1) {
    for (int keys = most; keys >= 16; keys /= 2) list.push_back({1, 1, keys});
    return list;
  }
  for (int i = 1; i <= (rank > 2 ? 8 : 1); ++i) {
    for (int j = 1; j <= 16; ++j) {
      for (int k = 4; i * j * k <= most; k += 4) {
        if (i * j * k % 16 == 0) list.push_back({i, j, k});
      }
    }
  }
  return list;
}

/// Sums over an axis of all families, computed once per extents.
class AxisSums {
 public:
  explicit AxisSums(const std::vector<Family>& list) : families_(list) {}

  /// Padded pairs of one head.
  double pairs(const Extent& q, const Extent& kv) {
    return total([&](std::size_t f, int a) { return axis(f, a, q, kv).first; });
  }
  /// Pairs of a query tile and a key tile.
  double visits(const Extent& q, const Extent& kv) {
    return total([&](std::size_t f, int a) { return axis(f, a, q, kv).second; });
  }
  double tiles(const Extent& q) const {
    double n = 0;
    for (const Family& family : families_) {
      n += family.sum([&](int a, const geometry::Axis& axis) {
        return static_cast<double>(geometry::ceil_div(axis.queries, q[static_cast<std::size_t>(a)]));
      });
    }
    return n;
  }

 private:
  template <class Of>
  double total(const Of& of) {
    double n = 0;
    for (std::size_t f = 0; f < families_.size(); ++f) {
      double product = families_[f].cells;
      for (int a = 0; a < geometry::kRank; ++a) product *= of(f, a);
      n += product;
    }
    return n;
  }
  std::pair<double, double> axis(std::size_t f, int a, const Extent& q, const Extent& kv) {
    const auto n = static_cast<std::size_t>(a);
    const auto [place, added] = known_.try_emplace({f, a, q[n], kv[n]});
    if (added) {
      for (const auto& c : families_[f].axes[n]) {
        const auto pairs = static_cast<double>(geometry::tile_pairs(c.axis, q[n], kv[n]));
        place->second.first += c.count * pairs;
        place->second.second += c.count * pairs / (q[n] * kv[n]);
      }
    }
    return place->second;
  }

  const std::vector<Family>& families_;
  std::map<std::tuple<std::size_t, int, int, int>, std::pair<double, double>> known_;
};

GpuTarget device_of(const PlanOptions& options) {
  if (options.gpu.major != 0) return options.gpu;
  const jit::Device& device = jit::current_device();
  return {.major = device.arch.major,
          .minor = device.arch.minor,
          .multiprocessors = device.multiprocessors,
          .shared_bytes_per_block = device.shared_bytes_per_block};
}

}  // namespace

std::string supports(const Problem& p) {
  if (p.dtype != DType::bfloat16 && p.dtype != DType::float16) {
    return "engine sm80 computes bfloat16 and float16, dtype is " + std::string(dtype_name(p.dtype));
  }
  if (const auto* dense = std::get_if<Dense>(&p.mask);
      dense != nullptr && !(dense->cumulative_queries.empty() && dense->key_lengths.empty())) {
    return "engine sm80 takes no packed sequences and no key_lengths";
  }
  if (p.head_dim > kMostHeadDim || p.head_dim_v > kMostHeadDim) {
    return "engine sm80 takes head_dim and head_dim_v up to " + std::to_string(kMostHeadDim) + ", they are " +
           std::to_string(p.head_dim) + " and " + std::to_string(p.head_dim_v);
  }
  return "";
}

void plan_problem(Plan& plan, const PlanOptions& options) {
  const Problem& p = plan.problem;
  plan.gpu.device = device_of(options);
  if (plan.gpu.device.major < 8) {
    throw Unsupported("engine sm80 needs compute capability 8.0, the device has " +
                      std::to_string(plan.gpu.device.major) + "." + std::to_string(plan.gpu.device.minor));
  }
  const std::vector<Family> list = families(p);
  AxisSums sums(list);
  const int group = static_cast<int>(p.heads / p.heads_kv);
  const auto width = static_cast<double>(p.head_dim + p.head_dim_v);
  const bool biased = p.rpb || p.attn_bias;
  double best = std::numeric_limits<double>::infinity();
  for (const Shape& shape : kShapes) {
    if (std::max(p.head_dim, p.head_dim_v) > shape.head_dim || (biased && shape.row_blocks > 1)) continue;
    const int rows = 16 * shape.row_blocks * shape.warps;
    for (int heads = 1; heads <= std::min(group, rows); heads *= 2) {
      for (const Extent& q : query_boxes(p.rank(), rows / heads)) {
        const double head_tiles = static_cast<double>(p.heads_kv) * geometry::ceil_div(group, heads);
        const double blocks = sums.tiles(q) * head_tiles;
        // The last wave of blocks leaves multiprocessors idle.
        const double waves = blocks / std::max(plan.gpu.device.multiprocessors * shape.blocks, 1);
        const double idle = waves > 0 ? (static_cast<double>(static_cast<std::int64_t>(waves)) + 1) / waves : 1;
        const double positions = static_cast<double>(q[0]) * q[1] * q[2];
        for (const Extent& kv : key_boxes(p.rank(), shape.most_keys)) {
          Spec spec;
          spec.head_dim = static_cast<int>(p.head_dim);
          spec.head_dim_v = static_cast<int>(p.head_dim_v);
          spec.tile_kv = kv;
          spec.warps = shape.warps;
          spec.row_blocks = shape.row_blocks;
          spec.stages = shape.stages;
          if (shared_bytes(spec) > plan.gpu.device.shared_bytes_per_block) continue;
          const int more = geometry::ceil_div(static_cast<int>(p.additional_tokens), spec.keys());
          const double pairs = sums.pairs(q, kv) / positions * rows * head_tiles + blocks * rows * more * spec.keys();
          const double visits = sums.visits(q, kv) * head_tiles + blocks * more;
          const double cost =
              (pairs * (width + kPairWork) * shape.slowness + visits * kTileWork * rows / 64 + blocks * kBlockWork) *
              std::min(idle, 8.0);
          if (cost >= best) continue;
          best = cost;
          GpuForwardPlan& f = plan.gpu.forward;
          f.tile = {.rows = rows, .heads = heads, .extent = q};
          f.kv_tile = kv;
          f.warps = shape.warps;
          f.row_blocks = shape.row_blocks;
          f.stages = shape.stages;
          f.blocks_per_multiprocessor = shape.blocks;
          f.blocks = static_cast<std::int64_t>(blocks);
          f.shared_bytes = shared_bytes(spec);
          f.work = {plan.mask_pairs, pairs};
        }
      }
    }
  }
  if (plan.gpu.forward.tile.rows == 0) {
    throw Unsupported("engine sm80 finds no tile for head_dim " + std::to_string(p.head_dim) + " in the " +
                      std::to_string(plan.gpu.device.shared_bytes_per_block) + " bytes of shared memory of the device");
  }
}

}  // namespace vicus::gpu
