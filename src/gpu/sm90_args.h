// What the kernel of engine sm90 is called with. Plain C++ for the host compiler and NVRTC alike.
#ifndef VICUS_GPU_SM90_ARGS_H_
#define VICUS_GPU_SM90_ARGS_H_

#include "args.h"
#include "vicus/geometry.h"

namespace vicus::gpu {

/// The driver's CUtensorMap: how the copy engine finds a box of a tensor.
struct alignas(64) TensorMap {
  unsigned long long words[16] = {};
};

/// What the copy engine steps over in a box, and how long a box may be with that.
inline constexpr int kMostDilation = 8, kMostSpan = 256;

/// Loads that a line of `rows` positions takes, each a number of groups of 8 that the copy engine can step over.
VICUS_GEOM int pieces_of(int rows, int dilation) {
  int pieces = 1;
  while ((pieces > 1 && rows % (8 * pieces) != 0) || (rows / pieces - 1) * dilation + 1 > kMostSpan) ++pieces;
  return pieces;
}

/// The first place of a sequence for its tiles of `extent` tokens, when `tokens` are in the sequences before it: of all its
/// places up to those of the next sequence at most one stays empty.
VICUS_GEOM int places_before(int tokens, int sequence, int extent) { return tokens / extent + sequence; }

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

/// Which tile a block takes in a round, where blocks stay on their multiprocessor: back and forth, so that none has the longest
/// of each round.
VICUS_GEOM int tile_of_round(int round, int block, int blocks) {
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

struct Sm90Args {
  TensorMap query, key, value, additional_key, additional_value;
  ForwardArgs forward;
  TileOrder order;
  int tiles = 0;  ///< of queries, of all heads and cells
  int parts = 1;  ///< of the keys of each
  /// Causal packed sequences of different lengths: places for tiles that all of them share, and how many they are
  /// (places_before). 0: each has as many tiles as the longest.
  int places = 0, sequences = 0;
  /// Where there are several: float32 scratch [parts, B, *X, H, Dv] and [parts, B, *X, H], and rows of a part.
  Rows part_output, part_logsumexp;
  long long part_rows = 0;
};

/// Rows are what a block owns, columns what it meets; first and second name the product that a tensor goes into.
struct Sm90BackwardArgs {
  TensorMap row_first, row_second, first, second, additional_first, additional_second;
  TensorMap sums_first, sums_second;  ///< gradients of the rows, of blocks that store them by boxes
  TensorMap query_sums;               ///< float32 scratch: features, token axes, heads of all batch entries
  BackwardArgs backward;
  TileOrder order;  ///< packed sequences: along the last axis, places for tiles as above
};

}  // namespace vicus::gpu

#endif  // VICUS_GPU_SM90_ARGS_H_
