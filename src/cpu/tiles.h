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

/// Packed keys [start, start + len) in the order of the packed box. Lanes in `others` take [other, other + len) instead.
struct Run {
  int start = 0, len = 0;
  int other = 0;
  std::uint64_t others = 0;

  /// Cuts off the first `n` keys.
  Run take(int n) {
    const Run first = {start, n, other, others};
    start += n;
    other += n;
    len -= n;
    return first;
  }
};

/// Folded windows. Of the keys of a tile, on an axis before the last, position begin + j and position begin + j + `period`
/// share one row of scores, j < `shared`, where no query sees both: each lane takes the key that it sees. A window of 7 and
/// four queries so take 7 rows of scores instead of 10. `lanes[j]` take the later key.
///
/// A kernel loads the rows of both keys by blocks of lanes, so that a block must agree: its queries are neighbours on the
/// last axis, and absent ones go with them.
struct Fold {
  int axis = 0, period = 0, shared = 0;
  std::uint64_t lanes[kMaxRows] = {};

  /// Positions of `sub` on axis `a` that have scores of their own.
  [[nodiscard]] int size(const Box& sub, int a) const { return sub.axis[a].size() - (a == axis ? shared : 0); }
  [[nodiscard]] std::uint64_t lanes_of(int i, int j) const {
    const int at = axis == 0 ? i : j;
    return at < shared ? lanes[at] : 0;
  }
};
/// Lanes of a tile that folds, and of one of its blocks.
inline constexpr int kFoldRows = 16, kFoldLanes = 4;
/// The period, for `keys` positions that windows of at most `window` cover.
[[nodiscard]] inline int fold_period(int keys, int window) { return std::max(window, geometry::ceil_div(keys, 2)); }
/// Every key has a row of its own.
inline constexpr Fold kNoFold;

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
/// of the box, in row-major order or with axis 1 before axis 0, may lie in a ring of `ring` rows.
inline int make_runs(const Box& packed, const Box& sub, Run* runs, int ring = std::numeric_limits<int>::max(),
                     const Fold& fold = kNoFold, bool axis1_first = false) {
  int count = 0;
  const int width = packed.axis[2].size();
  const int step0 = axis1_first ? 1 : packed.axis[1].size(), step1 = axis1_first ? packed.axis[0].size() : 1;
  const auto place = [&](int i, int j) {
    const int line =
        (sub.axis[0].begin + i - packed.axis[0].begin) * step0 + (sub.axis[1].begin + j - packed.axis[1].begin) * step1;
    return (line * width + sub.axis[2].begin - packed.axis[2].begin) % ring;
  };
  const auto add = [&](const Run& run) {
    Run* last = count > 0 ? runs + count - 1 : nullptr;
    if (last != nullptr && last->start + last->len == run.start && (last->others | run.others) == 0) {
      last->len += run.len;
    } else {
      runs[count++] = run;
    }
  };
  for (int i = 0; i < fold.size(sub, 0); ++i) {
    for (int j = 0; j < fold.size(sub, 1); ++j) {
      const int start = place(i, j);
      Run line = {start, sub.axis[2].size(), start, fold.lanes_of(i, j)};
      if (line.others != 0) line.other = fold.axis == 0 ? place(i + fold.period, j) : place(i, j + fold.period);
      while (line.len > 0) {
        add(line.take(std::min(line.len, ring - std::max(line.start, line.other))));
        line.start %= ring;
        line.other %= ring;
      }
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
  /// that changes what it gets calls `forget`. With a `fold_axis` (-1: none) keys that share scores share masks too:
  /// `fold()` says which.
  std::uint64_t* of(const geometry::Grid& grid, const Tile& tile, const Box& sub, int fold_axis = -1) {
    int length = 0;
    bool same = tile.heads == heads_ && fold_axis == fold_axis_;
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
    fold_axis_ = fold_axis;
    make(tile, sub);
    return masks_;
  }
  void forget() { heads_ = 0; }
  /// Of the masks made last.
  [[nodiscard]] const Fold& fold() const { return fold_; }

 private:
  // `windows_` are those of `tile`.
  void choose_fold(const Tile& tile, const Box& sub) {
    fold_.shared = 0;
    if (fold_axis_ < 0) return;
    const int a = fold_.axis = fold_axis_;
    const int queries = tile.box.axis[a].size();
    const int* window = windows_ + 2;
    if (a == 1) window += 2 * tile.box.axis[0].size() + 2;
    int longest = 0;
    for (int p = 0; p < queries; ++p) longest = std::max(longest, window[2 * p + 1] - window[2 * p]);
    fold_.period = fold_period(sub.axis[a].size(), longest);
    fold_.shared = sub.axis[a].size() - fold_.period;
    std::fill_n(fold_.lanes, fold_.shared, 0);
    const int below = a == 0 ? tile.extent[1] * tile.extent[2] : tile.extent[2];
    for (int lane = 0; lane < kFoldRows; lane += kFoldLanes) {
      const int p = lane / below % tile.extent[static_cast<std::size_t>(a)];
      if (p >= queries) continue;
      const std::uint64_t block = ((std::uint64_t{1} << kFoldLanes) - 1) << lane;
      for (int key = std::max(window[2 * p], fold_.period); key < window[2 * p + 1]; ++key) {
        fold_.lanes[key - fold_.period] |= block;
      }
    }
  }

  void make(const Tile& tile, const Box& sub) {
    choose_fold(tile, sub);
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
    for (int j = 0; j < fold_.shared; ++j) seen[fold_.axis][j] |= seen[fold_.axis][j + fold_.period];
    std::uint64_t* mask = masks_;
    for (int i = 0; i < fold_.size(sub, 0); ++i) {
      for (int j = 0; j < fold_.size(sub, 1); ++j) {
        const std::uint64_t row = seen[0][i] & seen[1][j];
        for (int k = 0; k < sub.axis[2].size(); ++k) *mask++ = row & seen[2][k];
      }
    }
  }

  std::uint64_t *masks_, *axis_masks_;
  int heads_ = 0;  // of the tile the masks are for, 0 for none
  int fold_axis_ = -1;
  Fold fold_;
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
