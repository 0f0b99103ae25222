// The search for tiles. Costs are relative; the constants were fitted to measurements on an H100 (notes/gpu.md).
#include "gpu/planner.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/domain.h"
#include "core/families.h"
#include "core/log.h"
#include "gpu/axis_sums.h"
#include "gpu/shapes.h"
#include "gpu/spec.h"
#include "jit/device.h"
#include "vicus/error.h"

namespace vicus::gpu {
namespace {

/// Query gradients are summed with atomics up to this head dim: beyond, registers do not suffice. Biases take some.
constexpr int kMostSummed = 128, kMostSummedBiased = 96;
/// Registers hold a block's own rows up to this head dim, whatever the problem.
constexpr int kHoldEasily = 96;
/// Work besides products, in multiply-adds: of a pair (softmax, mask), of a byte that is loaded, of a block (its start and
/// end), and the same again for every 64 of its rows.
constexpr double kPairWork = 40, kByteWork = 13, kBlockWork = 2e6;
/// Meeting a tile costs as much as so many more keys of it: waiting, and the mask where warps meet parts.
constexpr int kTileKeys = 12, kPartKeys = 48, kPartKeysBackward = 24;
/// Lines of a warp's box: backward, shorter ones take longer than is counted here; a part's masks have one word for a line.
constexpr int kShortestLine = 4, kMostLine = 64;
/// What a pair costs whose columns do not follow each other in memory.
constexpr double kScattered = 1.05;
/// Warps of a multiprocessor that hide what each other waits for.
constexpr double kEnoughWarps = 12;
/// What waiting is worth where products take longer.
constexpr double kPlainWaiting = 0.1;
/// Shared memory that a multiprocessor keeps for itself, a block.
constexpr int kReservedBytes = 1024;
/// Columns that a warp meets at once: two bits for 8 of them, forward in one register, backward in two.
constexpr int kMostMet = 128, kMostMetBackward = 256;

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
    for (int keys = most; keys >= 16; keys -= 16) list.push_back({1, 1, keys});
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

GpuTarget target_of(const PlanOptions& options) {
  if (options.gpu.major != 0) return options.gpu;
  return jit::target_of(jit::device(jit::thread_device()));
}

/// Why a kernel of the plan has no tile.
std::string no_tile(const Plan& plan) {
  return "engine sm80 finds no tile for head_dim " + std::to_string(plan.problem.head_dim) + " and head_dim_v " +
         std::to_string(plan.problem.head_dim_v) + " in the " + std::to_string(plan.gpu.device.shared_bytes_per_block) +
         " bytes of shared memory of a block";
}

/// The search for the tiles of one kernel.
class Search {
 public:
  Search(const Plan& plan, Kernel kernel) : plan_(plan), p_(plan.problem), kernel_(kernel), sums_(list_) {}

  /// No rows where no tile fits into shared memory.
  template <class S>
  GpuKernelPlan run(std::span<const S> shapes) {
    for (const S& shape : shapes) {
      if (!fits(shape)) continue;
      GpuKernelPlan kernel = kernel_of(shape);
      if (meets_parts(shape)) {
        const int own = of_keys() ? shape.most_keys : shape.most_queries;
        const int met = of_keys() ? shape.most_queries : shape.most_keys;
        for (const Extent& tile : query_boxes(p_.rank(), own)) consider_parts(kernel, tile, met, shape.slowness);
        continue;
      }
      const int group = static_cast<int>(p_.heads / p_.heads_kv);
      for (int heads = 1; heads <= std::min(group, shape.most_queries); heads *= 2) {
        kernel.tile.heads = heads;
        for (const Extent& q : query_boxes(p_.rank(), shape.most_queries / heads)) {
          kernel.tile.extent = q;
          for (const Extent& kv : key_boxes(p_.rank(), shape.most_keys)) {
            kernel.kv_tile = kv;
            consider(kernel, shape.slowness);
          }
        }
      }
    }
    return best_;
  }

 private:
  [[nodiscard]] bool of_keys() const { return kernel_ == Kernel::keys || kernel_ == Kernel::plain_keys; }
  [[nodiscard]] bool fits(const Shape& shape) const {
    const int part = 16 * shape.splits;  // warps share features evenly
    const bool biased = p_.rpb || p_.attn_bias, more = p_.additional_tokens > 0;
    const std::int64_t width = std::max(p_.head_dim, p_.head_dim_v);
    return width <= shape.head_dim && (shape.head_dim <= 64 || width > shape.head_dim / 2) &&
           padded(p_.head_dim) % part == 0 && padded(p_.head_dim_v) % part == 0 &&
           (shape.of == Shape::all || shape.of == Shape::parts || !biased) &&
           (shape.of != Shape::dense || (p_.dense() && !more)) && (shape.of != Shape::parts || !(p_.dense() || more));
  }
  static bool meets_parts(const Shape& shape) { return shape.of == Shape::parts; }
  static bool meets_parts(const PlainShape&) { return false; }
  [[nodiscard]] bool fits(const PlainShape& shape) const {
    return std::max(p_.head_dim, p_.head_dim_v) <= shape.head_dim && p_.rank() <= shape.most_rank &&
           (shape.biased_or_more || !(p_.rpb || p_.attn_bias || p_.additional_tokens > 0));
  }

  [[nodiscard]] GpuKernelPlan kernel_of(const Shape& shape) const {
    GpuKernelPlan k;
    k.warps = shape.warps;
    k.row_blocks = shape.row_blocks;
    k.stages = shape.stages;
    k.splits = shape.splits;
    k.chunk = shape.chunk;
    k.hold = shape.hold;
    k.turns = shape.turns;
    const bool deep = meets_parts(shape) && kernel_ != Kernel::forward && p_.rank() == 3;
    const bool more = p_.rpb || p_.attn_bias || deep;  // registers
    k.blocks_per_multiprocessor = more ? std::min(shape.blocks, 2) : shape.blocks;
    return k;
  }
  [[nodiscard]] GpuKernelPlan kernel_of(const PlainShape& shape) const {
    GpuKernelPlan k;
    k.family = GpuKernels::plain;
    k.warps = shape.warps;
    k.stages = 1;
    k.thread_rows = shape.thread_rows;
    k.blocks_per_multiprocessor = shape.blocks;
    const int unit = p_.dtype == DType::float64 ? 16 : 32;  // features of a step of all threads
    const auto whole = [&](std::int64_t width, int part) {
      return width <= shape.whole ? geometry::ceil_div(static_cast<int>(width), unit) * unit : part;
    };
    if (kernel_ == Kernel::plain_forward) {
      k.depth = whole(p_.head_dim, shape.part);
      k.wide = whole(p_.head_dim_v, shape.wide_part);
    } else {
      k.depth = k.wide = whole(std::max(p_.head_dim, p_.head_dim_v), shape.part);
    }
    return k;
  }

  /// The warps of a block with the tile `own` own boxes of it, and meet of each other tile what sees their box or is seen:
  /// of the whole hull at once, or of bands of it.
  void consider_parts(GpuKernelPlan candidate, const Extent& own, int most_met, double slowness) {
    const Extent hull = sums_.widest_hull(own, of_keys());
    candidate.tile.heads = 1;
    for (const Extent& warp : query_boxes(p_.rank(), 16 * candidate.row_blocks)) {
      if (kernel_ != Kernel::forward && warp[2] < kShortestLine) continue;
      if (own[0] % warp[0] != 0 || own[1] % warp[1] != 0 || own[2] % warp[2] != 0) continue;
      const Extent seen = sums_.widest_hull(warp, of_keys());
      const auto first = static_cast<std::size_t>(3 - p_.rank());  // the axis that is cut into bands
      const int most_lines = candidate.stages == 1 ? hull[first] : std::min(hull[first], 8);
      for (int lines = candidate.stages == 1 ? most_lines : 1; lines <= most_lines; ++lines) {
        Extent met = hull, part = seen;
        met[first] = lines;
        part[first] = std::min(lines, seen[first]);
        const std::int64_t volume = std::int64_t{1} * part[0] * part[1] * part[2];
        if (volume > std::min(most_met, most_met_) || (p_.rank() > 1 && part[2] > kMostLine)) continue;
        candidate.tile.extent = of_keys() ? met : own;
        candidate.warp_tile = of_keys() ? part : warp;
        candidate.kv_tile = of_keys() ? own : met;
        candidate.warp_keys = of_keys() ? warp : part;
        consider(candidate, slowness);
      }
    }
  }

  void consider(GpuKernelPlan candidate, double slowness) {
    Spec spec;
    spec.kernel = kernel_;
    spec.dtype = p_.dtype;
    spec.head_dim = static_cast<int>(p_.head_dim);
    spec.head_dim_v = static_cast<int>(p_.head_dim_v);
    spec.bias_kind = p_.rpb ? BiasKind::relative : p_.attn_bias ? BiasKind::additive : BiasKind::none;
    spec.add_queries = plan_.gpu.backward.add_queries;
    set_tiles(spec, candidate);
    const Extent &q = candidate.tile.extent, &kv = candidate.kv_tile;
    const int heads = candidate.tile.heads;
    if (kernel_ == Kernel::queries && !spec.meets_parts() && spec.keys() % spec.chunk != 0) return;
    const int bytes = shared_bytes(spec);
    if (bytes > plan_.gpu.device.shared_bytes_per_block) return;
    const int rows = spec.rows() / candidate.splits;  // of a block
    const std::int64_t group = p_.heads / p_.heads_kv;
    const double head_tiles = static_cast<double>(p_.heads_kv) * std::ceil(static_cast<double>(group) / heads);
    const double positions = static_cast<double>(q[0]) * q[1] * q[2];
    // Windows are alike from both sides: the tiles of queries that see a tile of keys are counted as if those were keys.
    const Extent &own = of_keys() ? kv : q, &other = of_keys() ? q : kv;
    const double blocks = sums_.tiles(own) * (of_keys() ? static_cast<double>(p_.heads_kv) : head_tiles);
    const int more = geometry::ceil_div(static_cast<int>(p_.additional_tokens), spec.keys());
    const double visits = sums_.visits(own, other) * head_tiles + (of_keys() ? 0 : blocks * more);
    const double columns = of_keys() ? positions * heads : spec.keys();
    double pairs = visits * rows * columns, waited = visits * rows * kTileKeys;
    if (spec.meets_parts()) {
      const int warp_rows = rows / spec.warps;
      const Extent &box = of_keys() ? candidate.warp_keys : candidate.warp_tile,
                   &part = of_keys() ? candidate.warp_tile : candidate.warp_keys;
      const double meetings = sums_.meetings(own, box, other) * head_tiles * warp_rows;
      const int met = part[0] * part[1] * part[2], padded_met = geometry::ceil_div(met, 16) * 16;
      pairs = meetings * padded_met;
      if (kernel_ != Kernel::forward) {  // 16 columns at a time, and past lines that are not seen
        const bool scattered = part[2] != other[2] || (part[0] > 1 && part[1] != other[1]);
        pairs = sums_.pairs(box, {1, 1, part[2]}) * head_tiles * padded_met / met * (scattered ? kScattered : 1);
      }
      waited = meetings * (kernel_ == Kernel::forward ? kPartKeys : kPartKeysBackward) +
               (visits * rows - meetings) * kTileKeys;  // of tiles that a warp leaves out
      const int fitting = (plan_.gpu.device.shared_bytes_per_block + kReservedBytes) / (bytes + kReservedBytes);
      candidate.blocks_per_multiprocessor = std::min(candidate.blocks_per_multiprocessor, fitting);
    }
    // The last wave of blocks leaves multiprocessors idle.
    const int resident = candidate.blocks_per_multiprocessor;
    const double waves = blocks / std::max(plan_.gpu.device.multiprocessors * resident, 1);
    const double idle = waves > 0 ? (std::floor(waves) + 1) / waves : 1;
    const double alone = 1 + 0.5 * std::max(0.0, 1 - resident * candidate.warps / kEnoughWarps);
    const double width = static_cast<double>(p_.head_dim + p_.head_dim_v);
    const double waiting = candidate.family == GpuKernels::plain ? kPlainWaiting : 1;
    const double loaded = visits * columns * width * static_cast<double>(dtype_size(p_.dtype));
    const double cost = ((pairs + waiting * waited) * (width + kPairWork) * slowness +
                         waiting * (loaded * kByteWork + blocks * kBlockWork * (1 + rows / 64.0))) *
                        alone * std::min(idle, 8.0);
    if (cost >= least_) return;
    least_ = cost;
    candidate.tile.rows = rows;
    candidate.blocks = static_cast<std::int64_t>(blocks);
    candidate.shared_bytes = bytes;
    candidate.work = {plan_.mask_pairs, pairs};
    best_ = candidate;
  }

  const Plan& plan_;
  const Problem& p_;
  Kernel kernel_;
  int most_met_ = kernel_ == Kernel::forward ? kMostMet : kMostMetBackward;
  std::vector<Family> list_ = families(p_);
  AxisSums sums_;
  GpuKernelPlan best_;
  double least_ = std::numeric_limits<double>::infinity();
};

GpuKernelPlan search(const Plan& plan, Kernel kernel, std::span<const Shape> shapes) {
  return Search(plan, kernel).run(shapes);
}
GpuKernelPlan search(const Plan& plan, Kernel kernel) {
  GpuKernelPlan found = Search(plan, kernel).run(plain_shapes(kernel, plan.problem.dtype));
  if (found.tile.rows == 0) throw Unsupported(no_tile(plan));
  return found;
}

/// Why the problem is one for plain kernels; empty where it is not.
std::string plain_reason(const Problem& p) {
  if (p.dtype == DType::float32 || p.dtype == DType::float64) {
    return std::string(dtype_name(p.dtype)) + " is computed in its own precision";
  }
  if (std::max(p.head_dim, p.head_dim_v) <= kMostHeadDim) return "";
  return "tensor cores take head_dim and head_dim_v up to " + std::to_string(kMostHeadDim) + ", they are " +
         std::to_string(p.head_dim) + " and " + std::to_string(p.head_dim_v);
}

/// Backward with tensor cores. False where a kernel has no tile.
bool plan_backward(Plan& plan) {
  const Problem& p = plan.problem;
  GpuPlan& g = plan.gpu;
  g.backward.queries = search(plan, Kernel::queries, kBackwardQueries);
  g.backward.keys = search(plan, Kernel::keys, kBackwardKeys);
  // Where warps meet parts of tiles, sums with atomics would take longer than a pass of their own.
  const bool parts = g.backward.keys.warp_keys[0] > 0;
  const int most = p.rpb || p.attn_bias ? kMostSummedBiased : kMostSummed;
  g.backward.add_queries = plan.backward.kv_splits_allowed > 1 && std::max(p.head_dim, p.head_dim_v) <= most && !parts;
  if (g.backward.add_queries) {
    g.backward.queries = {};
    g.backward.keys = search(plan, Kernel::keys, kBackwardKeysAdding);
  }
  if (g.backward.keys.tile.rows == 0 || (!g.backward.add_queries && g.backward.queries.tile.rows == 0)) return false;
  // Biases leave no registers for what a block holds of its own rows: it is read again.
  if (std::max(p.head_dim, p.head_dim_v) > kHoldEasily && (p.rpb || p.attn_bias)) g.backward.queries.hold = false;
  return true;
}

std::size_t rows_of(const Problem& p) { return static_cast<std::size_t>(p.batch * p.queries() * p.heads); }

/// Of gradients with tensor cores: two numbers of each query and head, dQ where kernels of keys sum it, and dK and dV of each
/// part of the heads where there are several.
std::size_t gradient_bytes(const Problem& p, const GpuGradientPlan& gradients) {
  const int sums = gradients.add_queries ? padded(p.head_dim) : 0;
  return rows_of(p) * static_cast<std::size_t>(2 + sums) * sizeof(float) +
         head_parts_bytes(p, gradients.keys.key_parts);
}

/// Puts kernels of engine sm90 into the plan, where it is asked for or they are worth it.
void prefer_boxes(Plan& plan, const PlanOptions& options) {
  const bool asked = options.engine == Engine::sm90;
  // A pair takes less time here: by small windows, where both engines are about equal (notes/sm90.md and sm90_backward.md).
  // By several blocks on a multiprocessor: least.
  constexpr double kFaster = 1.75, kGradientsFaster = 1.45, kForwardCrowdsFaster = 2.2, kKeyCrowdsFaster = 2.5,
                   kQueryCrowdsFaster = 2;
  GpuPlan& g = plan.gpu;
  const bool possible = g.device.major == 9 && g.device.minor == 0 && (asked || supports_boxes(plan.problem).empty());
  if (!possible) return;
  auto [boxes, candidates] = plan_boxes(plan, options);
  if (asked && boxes.tile.rows == 0) {
    throw Unsupported("engine sm90 finds no tile for the dilation, head_dim " + std::to_string(plan.problem.head_dim) +
                      " and head_dim_v " + std::to_string(plan.problem.head_dim_v));
  }
  const auto chosen = [&](bool exists, double pairs, double otherwise, double faster) {
    return exists && (asked || pairs <= faster * otherwise);
  };
  bool any = false;
  const double forward_faster = boxes.blocks_per_multiprocessor > 1 ? kForwardCrowdsFaster : kFaster;
  if (chosen(boxes.tile.rows > 0, busy_pairs(plan, boxes), busy_pairs(plan, g.forward), forward_faster)) {
    g.forward_unboxed = g.forward;
    g.forward = boxes;
    g.forward.heads_in_turns = heads_in_turns(plan, Kernel::sm90_forward);
    g.forward_scratch_bytes = parts_bytes(plan.problem, boxes.key_parts);
    plan.candidates = std::move(candidates);
    any = true;
  }
  GpuGradientPlan gradients = plan_box_gradients(plan, asked);
  const bool plain = g.backward.keys.family == GpuKernels::plain;  // which are slower in any case
  const bool exists = gradients.keys.tile.rows > 0, crowd = gradients.keys.blocks_per_multiprocessor > 1;
  const auto pairs = [](const GpuKernelPlan& kernel) { return kernel.work.tile_pairs; };
  const bool better =
      plain   ? exists
      : crowd ? chosen(exists, pairs(gradients.keys), pairs(g.backward.keys), kKeyCrowdsFaster)
              : chosen(exists, gradient_products(gradients), gradient_products(g.backward), kGradientsFaster);
  if (better) {
    // Those of queries may be faster by the other engine, whose statistics are the same.
    const bool apart = !plain && crowd && !gradients.add_queries && g.backward.queries.tile.rows > 0;
    if (apart && !chosen(true, pairs(gradients.queries), pairs(g.backward.queries), kQueryCrowdsFaster)) {
      gradients.queries = g.backward.queries;
    }
    gradients.scratch_bytes = gradient_bytes(plan.problem, gradients);
    g.backward_unboxed = g.backward;
    g.backward = gradients;
    g.backward.queries.heads_in_turns = heads_in_turns(plan, Kernel::sm90_queries);
    g.backward.keys.heads_inside = heads_inside(plan, g.backward.keys, g.backward.add_queries);
    g.backward.keys.heads_in_turns = heads_in_turns(plan, Kernel::sm90_keys);
    any = true;
  }
  if (!any) return;
  plan.engine = Engine::sm90;
  if (g.forward.family != GpuKernels::plain && g.backward.keys.family != GpuKernels::plain) g.reason.clear();
  if (!asked) plan.reason = "the fastest engine that takes the problem";
}

}  // namespace

std::string supports(const Problem& p) {
  if (p.head_dim > kMostPlainHeadDim || p.head_dim_v > kMostPlainHeadDim) {
    return "engine sm80 takes head_dim and head_dim_v up to " + std::to_string(kMostPlainHeadDim) + ", they are " +
           std::to_string(p.head_dim) + " and " + std::to_string(p.head_dim_v);
  }
  return "";
}

void plan_problem(Plan& plan, const PlanOptions& options) {
  const Problem& p = plan.problem;
  plan.gpu.device = target_of(options);
  if (plan.gpu.device.major < 8) {
    throw Unsupported("engine sm80 needs compute capability 8.0, the device has " +
                      std::to_string(plan.gpu.device.major) + "." + std::to_string(plan.gpu.device.minor));
  }
  GpuPlan& g = plan.gpu;
  if (plan.engine == Engine::sm90 && (g.device.major != 9 || g.device.minor != 0)) {
    throw Unsupported("engine sm90 needs compute capability 9.0, the device has " + std::to_string(g.device.major) +
                      "." + std::to_string(g.device.minor));
  }
  g.reason = plain_reason(p);
  const bool possible = g.reason.empty();
  if (possible) g.forward = search(plan, Kernel::forward, kForward);
  if (g.forward.tile.rows == 0) {
    if (possible) g.reason = no_tile(plan) + " with tensor cores";
    g.forward = search(plan, Kernel::plain_forward);
  }
  if (possible && plan_backward(plan)) {
    g.backward.scratch_bytes = gradient_bytes(p, g.backward);
  } else {
    if (g.reason.empty()) g.reason = no_tile(plan) + " for gradients with tensor cores";
    g.backward.add_queries = false;
    g.backward.queries = search(plan, Kernel::plain_queries);
    g.backward.keys = search(plan, Kernel::plain_keys);
    g.backward.scratch_bytes = rows_of(p) * static_cast<std::size_t>(accumulator_bytes(p.dtype));
  }
  g.forward.heads_in_turns = heads_in_turns(plan, Kernel::forward);
  g.backward.queries.heads_in_turns = heads_in_turns(plan, Kernel::queries);
  g.backward.keys.heads_in_turns = heads_in_turns(plan, Kernel::keys);
  if (options.engine != Engine::sm80) prefer_boxes(plan, options);
  if (!g.reason.empty()) log(LogLevel::info, "plain kernels: " + g.reason);
  // Also of calls whose tensors the copy engine cannot address.
  const GpuGradientPlan& adding = g.backward.add_queries ? g.backward : portable_gradients(g);
  if (!adding.add_queries) return;
  plan.backward.kv_splits = std::min(plan.backward.kv_splits_allowed, std::max<std::int64_t>(adding.keys.blocks, 1));
}

}  // namespace vicus::gpu
