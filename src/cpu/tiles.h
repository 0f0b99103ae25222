// Query tiles and key boxes at work: which lane is which query, which lanes see which key. Scalar code, shared by both
// passes; windows come from geometry.h.
#ifndef VICUS_CPU_TILES_H_
#define VICUS_CPU_TILES_H_

#include <algorithm>
#include <cstdint>

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

/// The keys of `sub` inside the packed box `packed`, as runs of adjacent packed rows. Returns the number of runs.
inline int make_runs(const Box& packed, const Box& sub, Run* runs) {
  int count = 0;
  const int width = packed.axis[2].size();
  for (int i = sub.axis[0].begin; i < sub.axis[0].end; ++i) {
    for (int j = sub.axis[1].begin; j < sub.axis[1].end; ++j) {
      const int row = (i - packed.axis[0].begin) * packed.axis[1].size() + j - packed.axis[1].begin;
      const Run run = {row * width + sub.axis[2].begin - packed.axis[2].begin, sub.axis[2].size()};
      if (count > 0 && runs[count - 1].start + runs[count - 1].len == run.start) {
        runs[count - 1].len += run.len;
      } else {
        runs[count++] = run;
      }
    }
  }
  return count;
}

/// For every key of `sub` in row-major order the lanes that see it: the conjunction of its axes. `axis_masks` is scratch
/// for as many words as `sub` has positions on its three axes together.
inline void make_masks(const geometry::Grid& grid, const Tile& tile, const LaneMasks& lanes, const Box& sub,
                       std::uint64_t* axis_masks, std::uint64_t* masks) {
  std::uint64_t* seen[geometry::kRank];
  for (int a = 0; a < geometry::kRank; ++a) {
    const Span keys = sub.axis[a];
    seen[a] = axis_masks;
    axis_masks += keys.size();
    std::fill_n(seen[a], keys.size(), 0);
    for (int p = tile.box.axis[a].begin; p < tile.box.axis[a].end; ++p) {
      const Span window = geometry::intersect(geometry::window(grid.axis[a], p), keys);
      const std::uint64_t bits = lanes.at[a][p - tile.box.axis[a].begin];
      for (int k = window.begin; k < window.end; ++k) seen[a][k - keys.begin] |= bits;
    }
  }
  for (int i = 0; i < sub.axis[0].size(); ++i) {
    for (int j = 0; j < sub.axis[1].size(); ++j) {
      const std::uint64_t row = seen[0][i] & seen[1][j];
      for (int k = 0; k < sub.axis[2].size(); ++k) *masks++ = row & seen[2][k];
    }
  }
}

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
