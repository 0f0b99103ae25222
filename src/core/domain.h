// A problem cut into independent grids. A Cell is one sequence (batch entry or packed sequence) of one residue class of
// the dilation: inside it, queries and keys are positions on three axes with one geometry::Axis each, and nothing in it
// sees anything of another cell but the additional tokens of its batch entry. Engines loop over cells, never over
// dilation, packing or padding.
#ifndef VICUS_CORE_DOMAIN_H_
#define VICUS_CORE_DOMAIN_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "vicus/geometry.h"
#include "vicus/problem.h"
#include "vicus/tensor.h"

namespace vicus {

using Position = std::array<int, geometry::kRank>;

struct Cell {
  std::int64_t batch = 0;                       ///< entry of dimension 0
  std::int64_t first_query = 0, first_key = 0;  ///< token where a packed sequence starts, on the last axis
  geometry::Grid grid;                          ///< leading unused axes have one position
  Position dilation{1, 1, 1}, residue{0, 0, 0};
};

/// Where only the calls know the lengths of sequences (Dense::device), cells have the longest: for counts, not for engines.
class Domain {
 public:
  explicit Domain(const Problem& problem);

  [[nodiscard]] std::int64_t size() const { return sequences_ * classes_; }
  [[nodiscard]] Cell cell(std::int64_t index) const;
  /// Cells [first, second) hold the queries of batch entry `batch`.
  [[nodiscard]] std::pair<std::int64_t, std::int64_t> cells_of(std::int64_t batch) const;
  /// Cells among which the largest is, on every axis: one where all sequences are alike, otherwise all.
  [[nodiscard]] std::int64_t differing_cells() const { return alike_ ? std::min<std::int64_t>(size(), 1) : size(); }

 private:
  const Problem& problem_;
  std::int64_t sequences_ = 0;
  bool alike_ = true;  ///< all sequences have the same lengths
  std::int64_t classes_ = 1;
  Position class_count_{1, 1, 1};
};

/// Where the rows of a heads-last tensor [B, *X, H, D] lie for the positions of a cell. Offsets in elements.
struct RowMap {
  std::int64_t origin = 0;
  std::array<std::int64_t, geometry::kRank> step{};
  std::int64_t head_step = 0;

  [[nodiscard]] std::int64_t row(const Position& p, std::int64_t head) const {
    return origin + p[0] * step[0] + p[1] * step[1] + p[2] * step[2] + head * head_step;
  }
};

/// `first_token` is the cell's first_query or first_key, by what the tensor holds. The last dimension of `tensor` may be
/// missing, as in a logsumexp [B, *X, H].
[[nodiscard]] RowMap row_map(const TensorLayout& tensor, const Problem& problem, const Cell& cell,
                             std::int64_t first_token);

/// Rows of the additional tokens [B, T, Hkv, D], as positions (0, 0, t).
[[nodiscard]] RowMap additional_row_map(const TensorLayout& tensor, std::int64_t batch);

/// Row-major linear index of rpb at (key - query) of one axis after the other; see `RpbMap::offset`.
struct RpbMap {
  std::array<std::int64_t, geometry::kRank> step{};
  std::int64_t origin = 0;  ///< offset of the entry for key == query, without the head

  /// Offset for a key at position `k` and a query at position `q`: linear, hence a key part minus a query part.
  [[nodiscard]] std::int64_t part(const Position& p) const { return p[0] * step[0] + p[1] * step[1] + p[2] * step[2]; }
  [[nodiscard]] std::int64_t offset(const Position& k, const Position& q) const { return origin + part(k) - part(q); }
};

/// Offsets in elements of `rpb` [H, 2 * w0 - 1, ...], by its strides.
[[nodiscard]] RpbMap rpb_map(const TensorLayout& rpb, const Problem& problem);

}  // namespace vicus

#endif  // VICUS_CORE_DOMAIN_H_
