// In which order the blocks of a launch take tiles.
#ifndef VICUS_GPU_ORDER_H_
#define VICUS_GPU_ORDER_H_

#include <cstdint>

#include "gpu/args.h"
#include "gpu/spec.h"

namespace vicus::gpu {

/// Of `work`, or of `places` along the last axis where sequences share those. An int counts its `tiles`, of all cells, which have
/// as many `head_blocks` each; of `turns` heads they take turns.
[[nodiscard]] TileOrder order_of(const ForwardArgs& args, const Work& work, const Spec& spec, int head_blocks,
                                 std::int64_t tiles, int turns, int places = 0);

}  // namespace vicus::gpu

#endif  // VICUS_GPU_ORDER_H_
