#include "gpu/order.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>

#include "gpu/launch.h"

namespace vicus::gpu {
namespace {

// Axes in the order in which tiles follow each other. Which tiles a block of the forward pass gets is settled by it: causal
// axes, along which they differ in length, come last. Other blocks come as some end. By boxes they wait for memory, and the
// hull of what those at work load, or add to, is to be small, so that the second cache keeps it: an axis along which the next
// tile adds little to it, and all tiles not much more, comes before those after it in memory where that is less than half.
// Engine sm80 waits for its products, and is slower by that (notes/gpu.md).
std::array<std::size_t, 3> axes_of(const ForwardArgs& args, const Spec& spec) {
  std::array<std::size_t, 3> axes{2, 1, 0};
  if (spec.kernel == Kernel::sm90_forward) {
    std::stable_partition(axes.begin(), axes.end(), [&](std::size_t a) { return !spec.causal.at(a); });
    return axes;
  }
  if (!loads_boxes(spec.kernel)) return axes;
  const auto growth = [&](std::size_t a) {
    const double window = spec.window.at(a);
    return spec.tile_q.at(a) / window * (args.len[a] / (window * spec.dilation.at(a)));
  };
  for (std::size_t i = 1; i < axes.size(); ++i) {
    for (std::size_t j = i; j > 0 && 2 * growth(axes.at(j)) < growth(axes.at(j - 1)); --j) {
      std::swap(axes.at(j), axes.at(j - 1));
    }
  }
  return axes;
}

}  // namespace

TileOrder order_of(const ForwardArgs& args, const Work& work, const Spec& spec, int head_blocks, std::int64_t tiles,
                   int turns, int places) {
  require_countable("tiles of queries or keys", tiles);
  TileOrder order;
  if (tiles == 0) return order;  // the others may be beyond all bounds
  int step = 1;
  for (const std::size_t a : axes_of(args, spec)) {
    const int along = places > 0 && a == 2 ? places : std::max(work.tiles[a], 1);
    order.tiles[a] = Divisor(along);
    order.step[a] = Divisor(step);
    step *= along;
  }
  order.all = Divisor(step);
  order.head_blocks = Divisor(head_blocks);
  order.group = args.heads / args.heads_kv;
  order.group_blocks = Divisor(std::max(head_blocks / args.heads_kv, 1));
  const int heads = static_cast<int>(tiles / step);
  order.take_turns(heads, std::clamp(turns, 1, std::max(heads, 1)));
  return order;
}

}  // namespace vicus::gpu
