// Query tiles and key boxes at work: which lane is which query, which lanes see which key. Scalar code, shared by both
// passes; windows come from geometry.h.
#ifndef VICUS_CPU_TILES_H_
#define VICUS_CPU_TILES_H_

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/domain.h"
#include "cpu/layout.h"

namespace vicus::cpu {

using geometry::Box;
using geometry::Span;

/// Packed keys [start, start + len) in the order of the packed box.
struct Run {
  int start = 0, len = 0;
};

/// A query tile: lane ((h * e0 + i) * e1 + j) * e2 + k holds head `head` + h at position box.begin + (i, j, k).
struct Tile {
  Box box;            ///< positions, cut at the end of the grid
  Position extent{};  ///< e0, e1, e2 of the plan
  int head = 0;       ///< first query head
  int heads = 0;      ///< heads of the tile that exist

  /// Lanes that hold a query.
  [[nodiscard]] int lanes() const { return heads * static_cast<int>(box.volume()); }

  template <class Visit>
  void for_each_lane(const Visit& visit) const {
    for (int h = 0; h < heads; ++h) {
      for (int i = box.axis[0].begin; i < box.axis[0].end; ++i) {
        for (int j = box.axis[1].begin; j < box.axis[1].end; ++j) {
          int lane = (h * extent[0] + i - box.axis[0].begin) * extent[1] + j - box.axis[1].begin;
          lane *= extent[2];
          for (int k = box.axis[2].begin; k < box.axis[2].end; ++k) visit(lane++, head + h, Position{i, j, k});
        }
      }
    }
  }
};

/// Lanes by position: bit l of at[a][p - box.begin] is set when lane l's position on axis a is p.
struct LaneMasks {
  std::uint64_t active = 0;
  std::uint64_t at[geometry::kRank][kMaxRows];

  explicit LaneMasks(const Tile& tile) {
    for (int a = 0; a < geometry::kRank; ++a) std::fill_n(at[a], tile.box.axis[a].size(), 0);
    tile.for_each_lane([&](int lane, int, const Position& p) {
      const std::uint64_t bit = std::uint64_t{1} << lane;
      active |= bit;
      for (int a = 0; a < geometry::kRank; ++a) at[a][p[static_cast<std::size_t>(a)] - tile.box.axis[a].begin] |= bit;
    });
  }
};

/// The keys of `sub` inside the packed box `packed`, as runs of adjacent packed rows. Returns the number of runs. The rows
/// of the box, in row-major order, may lie in a ring of `ring` rows.
inline int make_runs(const Box& packed, const Box& sub, Run* runs, int ring = std::numeric_limits<int>::max()) {
  int count = 0;
  const int width = packed.axis[2].size();
  const auto add = [&](const Run& run) {
    if (count > 0 && runs[count - 1].start + runs[count - 1].len == run.start) {
      runs[count - 1].len += run.len;
    } else {
      runs[count++] = run;
    }
  };
  for (int i = sub.axis[0].begin; i < sub.axis[0].end; ++i) {
    for (int j = sub.axis[1].begin; j < sub.axis[1].end; ++j) {
      const int line = (i - packed.axis[0].begin) * packed.axis[1].size() + j - packed.axis[1].begin;
      const int start = (line * width + sub.axis[2].begin - packed.axis[2].begin) % ring;
      const int before_end = std::min(sub.axis[2].size(), ring - start);
      add({start, before_end});
      if (before_end < sub.axis[2].size()) add({0, sub.axis[2].size() - before_end});
    }
  }
  return count;
}

/// Masks of a tile's keys. In the middle of a grid they are the same from tile to tile, relative to the keys: they are
/// made again only when the windows have moved against the keys.
class Masks {
 public:
  /// `masks` holds as many words as a visit has keys, `axis_masks` as many as it has positions on its axes together.
  Masks(std::uint64_t* masks, std::uint64_t* axis_masks) : masks_(masks), axis_masks_(axis_masks) {}

  /// For every key of `sub` in row-major order the lanes of `tile` that see it: the conjunction of its axes. The caller
  /// that changes what it gets calls `forget`.
  std::uint64_t* of(const geometry::Grid& grid, const Tile& tile, const Box& sub) {
    int length = 0;
    bool same = tile.heads == heads_;
    const auto compare = [&](int value) {
      same = same && windows_[length] == value;
      windows_[length++] = value;
    };
    for (int a = 0; a < geometry::kRank; ++a) {
      compare(sub.axis[a].size());
      compare(tile.box.axis[a].size());
      for (int p = tile.box.axis[a].begin; p < tile.box.axis[a].end; ++p) {
        const Span window = geometry::intersect(geometry::window(grid.axis[a], p), sub.axis[a]);
        compare(window.begin - sub.axis[a].begin);
        compare(window.end - sub.axis[a].begin);
      }
    }
    if (same) return masks_;
    heads_ = tile.heads;
    make(tile, sub);
    return masks_;
  }
  void forget() { heads_ = 0; }

 private:
  void make(const Tile& tile, const Box& sub) {
    const LaneMasks lanes(tile);
    const int* next = windows_;
    std::uint64_t* seen[geometry::kRank];
    std::uint64_t* place = axis_masks_;
    for (int a = 0; a < geometry::kRank; ++a) {
      seen[a] = place;
      place += sub.axis[a].size();
      std::fill_n(seen[a], sub.axis[a].size(), 0);
      next += 2;
      for (int p = 0; p < tile.box.axis[a].size(); ++p, next += 2) {
        for (int k = next[0]; k < next[1]; ++k) seen[a][k] |= lanes.at[a][p];
      }
    }
    std::uint64_t* mask = masks_;
    for (int i = 0; i < sub.axis[0].size(); ++i) {
      for (int j = 0; j < sub.axis[1].size(); ++j) {
        const std::uint64_t row = seen[0][i] & seen[1][j];
        for (int k = 0; k < sub.axis[2].size(); ++k) *mask++ = row & seen[2][k];
      }
    }
  }

  std::uint64_t *masks_, *axis_masks_;
  int heads_ = 0;  // of the tile the masks are for, 0 for none
  int windows_[geometry::kRank * (2 + 2 * kMaxRows)] =
      {};  // per axis: keys, queries, and where each query's window lies
};

/// Extent of the pieces when `len` is cut into equal pieces of at most `most`.
inline int even_extent(int len, int most) {
  return len <= most ? std::max(len, 1) : geometry::ceil_div(len, geometry::ceil_div(len, most));
}

/// Extents of the boxes that `box` is packed in: row-major, whole inner axes first, at most `most` keys.
inline Position pack_extent(const Box& box, int most) {
  Position e{};
  e[2] = even_extent(box.axis[2].size(), most);
  e[1] = even_extent(box.axis[1].size(), std::max(most / e[2], 1));
  e[0] = even_extent(box.axis[0].size(), std::max(most / (e[2] * e[1]), 1));
  return e;
}

/// Calls `visit` with boxes of `extent` that tile `box`, in row-major order.
template <class Visit>
void for_each_box(const Box& box, const Position& extent, const Visit& visit) {
  if (box.empty()) return;
  for (int i = box.axis[0].begin; i < box.axis[0].end; i += extent[0]) {
    for (int j = box.axis[1].begin; j < box.axis[1].end; j += extent[1]) {
      for (int k = box.axis[2].begin; k < box.axis[2].end; k += extent[2]) {
        visit(geometry::intersect(Box{{{i, i + extent[0]}, {j, j + extent[1]}, {k, k + extent[2]}}}, box));
      }
    }
  }
}

}  // namespace vicus::cpu

#endif  // VICUS_CPU_TILES_H_
