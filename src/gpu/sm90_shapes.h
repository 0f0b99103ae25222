// The ways to build kernels by boxes among which their planner chooses: what won where it was measured on an H100
// (notes/sm90.md), and keeps to its registers.
#ifndef VICUS_GPU_SM90_SHAPES_H_
#define VICUS_GPU_SM90_SHAPES_H_

#include <span>

#include "gpu/spec.h"

namespace vicus::gpu {

/// A way to build a kernel, for head dims up to `head_dim`.
struct BoxShape {
  int head_dim, warpgroups, least_columns, most_columns, stages;  // columns: those of a tile that a box of rows meets
  bool ping_pong;
  double slowness;        // time of a product, relative
  int head_dims = 512;    // the most of both head dims together
  int second_stages = 0;  // gradients: of columns of the second product, where they come apart
  /// On a multiprocessor. Several, a crowd: one warpgroup each takes one tile of rows, and masks every tile of columns. Of
  /// windows on two and three axes, not with parts of the keys.
  int blocks = 1;
};
inline constexpr BoxShape kForwardShapes[] = {
    {64, 3, 48, 128, 2, true, 1.0},
    {64, 2, 48, 176, 2, false, 1.18},
    {64, 1, 48, 176, 2, false, 1.6},
    {64, 1, 32, 80, 2, false, 1.11, 512, 0, 4},
    {64, 1, 96, 112, 2, false, 1.11, 512, 0, 3},
    {72, 3, 48, 128, 2, true, 1.0, 144},
    {72, 2, 48, 176, 2, true, 1.15, 144},
    {72, 1, 48, 176, 2, false, 1.6, 144},
    {80, 3, 48, 112, 2, true, 1.0, 160},
    {80, 2, 48, 176, 2, true, 1.15, 160},
    {80, 1, 48, 176, 2, false, 1.6, 160},
    {128, 2, 48, 176, 2, true, 1.0},
    {128, 1, 48, 176, 2, false, 1.4},
    {192, 2, 32, 112, 2, false, 1.0},
    {192, 1, 32, 112, 2, false, 1.3},
    {256, 2, 32, 80, 2, false, 1.0},
    {256, 1, 32, 80, 2, false, 1.3},
};
inline constexpr BoxShape kQueriesShapes[] = {
    {64, 1, 48, 64, 3, false, 1.31, 512, 0, 3},
    {64, 3, 48, 80, 3, false, 1.0},
    {64, 2, 48, 96, 3, false, 1.2},
    {128, 2, 48, 96, 3, false, 1.0},
    {192, 2, 32, 80, 3, false, 1.0, 320, 2},
    {192, 2, 32, 64, 3, false, 1.0, 512, 2},
    {256, 2, 32, 48, 3, false, 1.0, 512, 1},
};
inline constexpr BoxShape kKeysShapes[] = {
    {64, 1, 96, 96, 3, false, 1.28, 512, 0, 2},
    {64, 2, 32, 96, 3, false, 1.0},
    {128, 2, 32, 64, 3, false, 1.0},
    {192, 2, 32, 32, 3, false, 1.2, 320},
    // dK alone
    {192, 2, 32, 64, 3, false, 1.0, 512, 2},
    {256, 2, 32, 48, 3, false, 1.0, 512, 1},
};
// dV alone
inline constexpr BoxShape kValuesShapes[] = {
    {192, 2, 32, 96, 2, false, 1.0, 512, 2},
    {256, 2, 32, 80, 2, false, 1.0, 512, 2},
};
// That also sum dQ: warpgroups share out 128 queries by 64 features, or 64 by 128.
inline constexpr BoxShape kAddingShapes[] = {
    {64, 2, 128, 128, 3, false, 1.0},
    {128, 2, 64, 64, 3, false, 1.0},
};

/// In columns: what a tile costs besides its products, what it costs to step over one, and what a tile of rows costs. A mask
/// makes a tile `masked` times as slow, and `awkward` times more where its lines differ by eights of keys (sm90_mask.cuh,
/// keys_in).
struct Costs {
  double tile, skip, rows, masked, awkward;
};
inline constexpr Costs kInTurn = {42, 10, 300, 1.22, 1.1};  // forward, but for crowds

inline std::span<const BoxShape> box_shapes(Kernel kernel, bool adds) {
  if (adds) return kAddingShapes;
  if (kernel == Kernel::sm90_queries) return kQueriesShapes;
  if (kernel == Kernel::sm90_keys) return kKeysShapes;
  if (kernel == Kernel::sm90_values) return kValuesShapes;
  return kForwardShapes;
}

}  // namespace vicus::gpu

#endif  // VICUS_GPU_SM90_SHAPES_H_
