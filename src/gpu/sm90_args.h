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

/// Which tile a block takes in a round, where blocks stay on their multiprocessor: back and forth, so that none has the longest
/// of each round.
VICUS_GEOM int tile_of_round(int round, int block, int blocks) {
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

struct Sm90Args {
  TensorMap query, key, value, additional_key, additional_value;
  ForwardArgs forward;
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
  BackwardArgs backward;  ///< packed sequences: in the order of tiles, along the last axis places for them as above
};

}  // namespace vicus::gpu

#endif  // VICUS_GPU_SM90_ARGS_H_
