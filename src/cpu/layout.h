// Sizes and places of the CPU engine's scratch memory: the planner reports them, the kernels carve by them.
#ifndef VICUS_CPU_LAYOUT_H_
#define VICUS_CPU_LAYOUT_H_

#include <cstddef>

#include "vicus/plan.h"

namespace vicus::cpu {

/// Features of one block of packed rows. Rows that are multiplied with lanes lie in blocks of this many features, one
/// block of all rows after the other, so that the distance between two rows is a constant of the kernels.
inline constexpr int kBlock = 64;
/// Widths are padded to this many elements: a whole number of vectors on every target.
inline constexpr int kPad = 16;
/// Most query rows of a tile: one bit each in a mask word.
inline constexpr int kMaxRows = 64;
/// Most query tiles of one forward task.
inline constexpr int kMaxStack = 16;
/// Most runs of one chunk.
inline constexpr int kMaxChunkRuns = 64;

[[nodiscard]] constexpr std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }
[[nodiscard]] constexpr int blocks(std::int64_t features) { return static_cast<int>((features + kBlock - 1) / kBlock); }

/// Elements are float64 for float64 problems, float32 otherwise.
[[nodiscard]] inline std::size_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

/// Hands out cache-line aligned places of one scratch buffer.
class Carver {
 public:
  std::size_t take(std::size_t bytes) {
    const std::size_t place = bytes_;
    bytes_ += round_up(bytes, 64);
    return place;
  }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

/// Byte offsets of the scratch of one forward task.
struct ForwardLayout {
  ForwardLayout(const Problem& problem, const ForwardPlan& plan);

  std::size_t query, out, top, sum;  ///< of the first tile; one more tile each *_step
  std::size_t query_step, out_step, row_step;
  std::size_t keys, values;  ///< packed rows; values lie in one block of value_width features
  std::size_t value_width;
  std::size_t scores, bias;  ///< [chunk_keys][rows]
  std::size_t factor;
  std::size_t masks, axis_masks, runs;  ///< per packed key
  std::size_t bytes;
};

/// Byte offsets of the scratch of one backward task.
struct BackwardLayout {
  BackwardLayout(const Problem& problem, const BackwardPlan& plan, std::int64_t tiles);

  std::size_t capacity;                              ///< rows of the packed panels: a key block, or additional tokens
  std::size_t grad_query, grad_query_step;           ///< [tiles] of [D][rows]
  std::size_t keys, values, grad_keys, grad_values;  ///< packed rows of one key block
  std::size_t query_rows, query, grad_out_rows, grad_out;  ///< the query tile, as rows and as lanes
  std::size_t tile_step;           ///< of these, one tile each where the plan keeps them; else 0: there is one
  std::size_t loaded, lse, delta;  ///< of each tile; one more each row_step, of `loaded` each byte
  std::size_t row_step;
  std::size_t scores, grad_scores, bias;  ///< [chunk_keys][rows]
  std::size_t row;                        ///< one block of a row
  std::size_t masks, axis_masks, runs;
  std::size_t bytes;
};

}  // namespace vicus::cpu

#endif  // VICUS_CPU_LAYOUT_H_
