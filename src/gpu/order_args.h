// In which order tiles follow each other. Plain C++ for the host compiler and NVRTC alike.
#ifndef VICUS_GPU_ORDER_ARGS_H_
#define VICUS_GPU_ORDER_ARGS_H_

#include "vicus/geometry.h"

namespace vicus::gpu {

/// A divisor that is known before the launch: n / value is a product and a shift, for 0 <= n < 2^31 (Granlund and Montgomery
/// 1994, with 31 bits).
struct Divisor {
  unsigned value = 1, factor = 1u << 31, shift = 0;

  Divisor() = default;
  VICUS_GEOM explicit Divisor(int divisor) : value(static_cast<unsigned>(divisor)), shift(0) {
    while (value > 1u << shift) ++shift;
    factor = static_cast<unsigned>(((1ull << (31 + shift)) + value - 1) / value);
  }
  [[nodiscard]] VICUS_GEOM int divide(int n) const {
    return static_cast<int>((2ull * static_cast<unsigned>(n) * factor >> 32) >> shift);
  }
  [[nodiscard]] VICUS_GEOM int remainder(int n) const { return n - divide(n) * static_cast<int>(value); }
};

/// In which order tiles follow each other: along the axes, then heads, then cells (sequence x residue class). Of tiles that
/// differ in length, those of several heads take turns, so that long ones come before short ones.
struct TileOrder {
  Divisor tiles[3], step[3];  ///< along each axis, and how many tiles later the next one along it comes
  Divisor all;                ///< of a head in a cell
  Divisor head_blocks;        ///< of a cell
  Divisor group_blocks;       ///< of the query heads that share a head of keys
  int group = 1;              ///< such heads; where several blocks share out those of a tile of keys, of one of them
  Divisor turns;              ///< tiles of as many heads as take turns
  Divisor heads, last_heads;  ///< such heads, and those that are left in the end
  int full = 0;               ///< times that as many as `heads` take turns
  int at_once = 0;            ///< blocks that begin together; others begin as those end

  /// Of `count` heads of all cells, so many take turns.
  VICUS_GEOM void take_turns(int count, int together) {
    heads = Divisor(together);
    last_heads = Divisor(count % together > 0 ? count % together : 1);
    turns = Divisor(together * static_cast<int>(all.value));
    full = count / together;
  }
  /// The number of the tile that comes n-th, with turns.
  [[nodiscard]] VICUS_GEOM int nth(int n) const {
    const int round = turns.divide(n), rest = n - round * static_cast<int>(turns.value);
    const Divisor& of = round < full ? heads : last_heads;
    const int tile = of.divide(rest), head = rest - tile * static_cast<int>(of.value);
    return (round * static_cast<int>(heads.value) + head) * static_cast<int>(all.value) + tile;
  }
};

}  // namespace vicus::gpu

#endif  // VICUS_GPU_ORDER_ARGS_H_
