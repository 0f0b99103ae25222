#include "gpu/sm90_engine.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>
#include <utility>

#include "gpu/lists.h"
#include "gpu/merge_args.h"
#include "gpu/order.h"
#include "jit/driver.h"

namespace vicus::gpu {
namespace {

using Extent = std::array<int, 3>;

constexpr std::size_t kMapRank = 5;
constexpr std::uint64_t kMostStride = std::uint64_t{1} << 40;  // bytes
constexpr int kSlab = 64;                                      // features of a box

/// The axes of a tensor [B, *X, H, D] as the copy engine counts them, innermost first: features, heads, two token axes and
/// the batch; or, for kernels of three axes, features and heads as one axis, and three token axes. load_box knows.
struct MapAxes {
  std::array<std::uint64_t, kMapRank> size{};
  std::array<std::uint64_t, kMapRank> stride{};  // bytes; of the innermost none
  std::array<std::uint32_t, kMapRank> box{}, step{};
};

MapAxes axes_of(const ConstTensorView& t, int rank, int box_heads, const Extent& box, const Extent& dilation) {
  const auto bytes = static_cast<std::int64_t>(dtype_size(t.dtype()));
  const int tokens = t.dims() - 3;  // token axes, which trail in three
  MapAxes axes;
  std::size_t n = 0;
  const auto add = [&](std::int64_t size, std::int64_t stride, int extent, int step) {
    axes.size.at(n) = static_cast<std::uint64_t>(size);
    // The stride of an axis of one place is never used, but must be a legal one.
    axes.stride.at(n) = static_cast<std::uint64_t>(size == 1 ? 16 : stride * bytes);
    axes.box.at(n) = static_cast<std::uint32_t>((extent - 1) * step + 1);
    axes.step.at(n++) = static_cast<std::uint32_t>(step);
  };
  const std::int64_t heads = t.size(tokens + 1), head_step = t.stride(tokens + 1), width = t.size(tokens + 2);
  if (rank < 3) {
    add(width, 0, kSlab, 1);
    add(heads, head_step, box_heads, 1);
  } else {
    add((heads - 1) * head_step + width, 0, kSlab, 1);
  }
  for (int a = 2; n + 1 < kMapRank; --a) {
    const int i = a - (3 - tokens);
    const auto at = static_cast<std::size_t>(a);
    add(i < 0 ? 1 : t.size(1 + i), i < 0 ? 0 : t.stride(1 + i), box.at(at), dilation.at(at));
  }
  add(t.size(0), t.stride(0), 1, 1);
  return axes;
}

bool addressable(const ConstTensorView& t, int rank) {
  if (!t) return true;
  const MapAxes axes = axes_of(t, rank, 1, {1, 1, 1}, {1, 1, 1});
  for (std::size_t i = 0; i < kMapRank; ++i) {
    const bool counted = axes.size.at(i) >= 1 && axes.size.at(i) <= std::numeric_limits<int>::max();
    if (!counted || (i > 0 && (axes.stride.at(i) == 0 || axes.stride.at(i) >= kMostStride))) return false;
  }
  return true;
}

TensorMap map_of(const ConstTensorView& t, int rank, int heads, const Extent& box, const Extent& dilation) {
  TensorMap map;
  if (!t) return map;
  const MapAxes axes = axes_of(t, rank, heads, box, dilation);
  const auto type = t.dtype() == DType::float16 ? jit::kTensorMapFloat16 : jit::kTensorMapBfloat16;
  jit::check(jit::driver().cuTensorMapEncodeTiled(
                 map.words, type, kMapRank, const_cast<void*>(t.data()), axes.size.data(), axes.stride.data() + 1,
                 axes.box.data(), axes.step.data(), jit::kTensorMapNotInterleaved, jit::kTensorMapSwizzle128,
                 jit::kTensorMapPromote256, jit::kTensorMapZeros),
             "cuTensorMapEncodeTiled", "describing a tensor to the copy engine");
  return map;
}

// The sums of dQ, [B, H, *X, width] in float32, by boxes of 16 features: sm90_query_sums.cuh.
TensorMap map_of_sums(const BackwardArgs& args, const Spec& spec) {
  constexpr std::uint32_t kSumSlab = 16;
  std::array<std::uint64_t, kMapRank> size{}, stride{};  // bytes
  std::array<std::uint32_t, kMapRank> box{}, step{};
  const auto set = [&](std::size_t n, std::int64_t count, std::int64_t elements, int extent) {
    size.at(n) = static_cast<std::uint64_t>(count);
    stride.at(n) = static_cast<std::uint64_t>(count == 1 ? 16 : elements * 4);
    box.at(n) = static_cast<std::uint32_t>(extent);
    step.at(n) = 1;
  };
  set(0, padded(spec.head_dim), 1, kSumSlab);
  for (std::size_t n = 1; n < 4; ++n) set(n, args.len[3 - n], args.query_sums.token[3 - n], spec.tile_kv.at(3 - n));
  set(4, std::int64_t{args.batch} * args.heads, args.query_sums.head, 1);
  TensorMap map;
  jit::check(jit::driver().cuTensorMapEncodeTiled(map.words, jit::kTensorMapFloat32, kMapRank, args.query_sums.data,
                                                  size.data(), stride.data() + 1, box.data(), step.data(),
                                                  jit::kTensorMapNotInterleaved, jit::kTensorMapNotSwizzled,
                                                  jit::kTensorMapPromote256, jit::kTensorMapZeros),
             "cuTensorMapEncodeTiled", "describing sums of dQ to the copy engine");
  return map;
}

}  // namespace

bool addressable(const Problem& p, std::initializer_list<ConstTensorView> tensors) {
  if (jit::driver().cuTensorMapEncodeTiled == nullptr) return false;
  return std::all_of(tensors.begin(), tensors.end(),
                     [&](const ConstTensorView& t) { return addressable(t, p.rank()); });
}

void launch_boxes(Loaded& kernels, const Spec& spec, const Plan& plan, const AttentionInputs& in,
                  const ForwardArgs& args, const KeyParts& parts, std::int64_t tiles) {
  Sm90Args all;
  if (spec.packed && spec.band_right >= 0 && spec.band_left < 0) {  // causal: kUneven
    const std::int64_t sequences = sequences_of(plan.problem);
    const std::int64_t places =
        places_before(static_cast<int>(plan.problem.queries()), static_cast<int>(sequences), spec.tile_q[2]);
    if (places < sequences * args.work.tiles[2]) {
      tiles = places * args.work.head_blocks;
      all.places = static_cast<int>(places);
      all.sequences = static_cast<int>(sequences);
    }
  }
  const std::int64_t blocks = tiles * parts.count;
  require_countable("tiles of queries", blocks);
  Extent queries = spec.tile_q;
  queries.at(static_cast<std::size_t>(spec.stack_axis)) /= spec.warps / 4;
  Extent keys = spec.tile_kv;
  if (spec.rank == 1) {
    queries[2] /= pieces_of(queries[2], spec.dilation[2]);
    keys[2] /= pieces_of(keys[2], spec.dilation[2]);
  }
  const Extent line = {1, 1, spec.rank == 1 ? keys[2] : spec.keys()}, undilated = {1, 1, 1};
  all.query = map_of(in.query, spec.rank, spec.tile_heads, queries, spec.dilation);
  all.key = map_of(in.key, spec.rank, 1, keys, spec.dilation);
  all.value = map_of(in.value, spec.rank, 1, keys, spec.dilation);
  all.additional_key = map_of(in.additional_keys, spec.rank, 1, line, undilated);
  all.additional_value = map_of(in.additional_values, spec.rank, 1, line, undilated);
  all.forward = args;
  all.forward.order =
      order_of(args, args.work, spec, args.work.head_blocks, tiles, plan.gpu.forward.heads_in_turns, all.places);
  all.tiles = static_cast<int>(tiles);
  all.parts = parts.count;
  all.part_output = parts.output;
  all.part_logsumexp = parts.logsumexp;
  all.part_rows = parts.rows;
  // Blocks stay on their multiprocessor, but for those of a crowd.
  const std::int64_t resident = spec.crowd() ? blocks : std::max(plan.gpu.device.multiprocessors, 1);
  kernels.launch(spec, std::min(blocks, resident), all);
}

void launch_merge(Loaded& kernels, const Spec& spec, const Problem& p, const ForwardArgs& args, const KeyParts& parts) {
  const std::int64_t rows = p.queries() * p.heads, of_a_block = spec.threads() / spec.lanes;
  require_countable("queries times heads", rows);
  MergeArgs all;
  all.outputs[0] = parts.output;
  all.logsumexps[0] = parts.logsumexp;
  all.part_rows = parts.rows;
  all.parts = parts.count;
  all.output = args.output;
  all.logsumexp = args.logsumexp;
  all.batch = static_cast<int>(p.batch);
  all.heads = args.heads;
  std::copy(std::begin(args.len), std::end(args.len), std::begin(all.len));
  kernels.launch(spec, {(rows + of_a_block - 1) / of_a_block, std::min(p.batch, kMostGridY)}, all);
}

void launch_boxes(Loaded& kernels, const Spec& spec, const Plan& plan, const AttentionInputs& in,
                  const ConstTensorView& grad_output, const AttentionGradients& out, const BackwardArgs& args,
                  std::int64_t blocks) {
  const GpuGradientPlan& gradients = plan.gpu.backward;
  const bool of_keys = has_boxes_of_keys(spec.kernel);
  const int parts = spec.key_parts ? args.key_parts : 1, head_blocks = args.work.head_blocks * parts;
  Sm90BackwardArgs all;
  int places = 0;
  if (spec.packed) {
    places = places_before(of_keys ? args.keys : args.len[2], args.sequences, spec.tile_q[2]);
    blocks = std::int64_t{places} * args.work.head_blocks;
  }
  blocks *= parts;
  require_countable("tiles of keys or queries", blocks);
  require_countable("queries times heads", in.query.numel() / in.query.size(in.query.dims() - 1));
  Extent rows = spec.tile_q;
  rows.at(static_cast<std::size_t>(spec.stack_axis)) /= spec.warps / 4;
  const Extent line = {1, 1, spec.keys()}, undilated = {1, 1, 1};
  const Extent &keys = of_keys ? rows : spec.tile_kv, &queries = of_keys ? spec.tile_kv : rows;
  const TensorMap query = map_of(in.query, spec.rank, 1, queries, spec.dilation);
  const TensorMap grad = map_of(grad_output, spec.rank, 1, queries, spec.dilation);
  const TensorMap key = map_of(in.key, spec.rank, 1, keys, spec.dilation);
  const TensorMap value = map_of(in.value, spec.rank, 1, keys, spec.dilation);
  all.row_first = of_keys ? key : query;
  all.row_second = of_keys ? value : grad;
  all.first = of_keys ? query : key;
  all.second = of_keys ? grad : value;
  if (spec.crowd()) {
    all.sums_first = map_of(of_keys ? out.key : out.query, spec.rank, 1, rows, spec.dilation);
    if (of_keys) all.sums_second = map_of(out.value, spec.rank, 1, rows, spec.dilation);
  }
  if (spec.additional) {
    all.additional_first = map_of(in.additional_keys, spec.rank, 1, line, undilated);
    all.additional_second = map_of(in.additional_values, spec.rank, 1, line, undilated);
  }
  if (of_keys && spec.add_queries) all.query_sums = map_of_sums(args, spec);
  all.backward = args;
  TileOrder& order = all.backward.order;
  const int turns = (of_keys ? gradients.keys : gradients.queries).heads_in_turns;
  order = order_of(args, args.work, spec, head_blocks, blocks, turns, places);
  order.at_once = plan.gpu.device.multiprocessors * spec.min_blocks;
  order.group /= parts;
  if (spec.kernel == Kernel::sm90_values) all.backward.grad_key = {};
  if (spec.sums_keys_alone()) all.backward.grad_value = {};
  if (!all.backward.grad_key.data) all.backward.key_sums = {};
  if (!all.backward.grad_value.data) all.backward.value_sums = {};
  kernels.launch(spec, blocks, all);
}

}  // namespace vicus::gpu
