// Tiles of keys that boxes of queries meet, counted exactly over a whole problem, axis by axis.
#ifndef VICUS_GPU_BOX_COUNTS_H_
#define VICUS_GPU_BOX_COUNTS_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "core/families.h"
#include "vicus/geometry.h"

namespace vicus::gpu {

/// Of one axis, summed over tiles of queries: key tiles of the hull, and of one warpgroup's box (the mean over boxes) key
/// tiles that it sees and those that all of it sees. And key tiles of the largest hull.
struct Counts {
  double hull = 0, seen = 0, whole = 0, most = 0;
  Counts& operator+=(const Counts& c) {
    hull += c.hull;
    seen += c.seen;
    whole += c.whole;
    most = std::max(most, c.most);
    return *this;
  }
};

inline Counts operator*(const Counts& a, const Counts& b) {
  return {a.hull * b.hull, a.seen * b.seen, a.whole * b.whole, a.most * b.most};
}
inline Counts operator*(double n, const Counts& a) { return {n * a.hull, n * a.seen, n * a.whole, a.most}; }

inline Counts count_tiles(const geometry::Axis& axis, int tile_q, int parts, int tile_kv) {
  Counts n;
  const int extent = tile_q / parts;
  for (int q = 0; q < axis.queries; q += tile_q) {
    const geometry::Span tile = {q, geometry::lo(q + tile_q, axis.queries)};
    const geometry::Span keys = geometry::hull(axis, tile);
    if (keys.empty()) continue;
    const int of_hull = geometry::ceil_div(keys.size(), tile_kv);
    n.hull += of_hull;
    n.most = std::max<double>(n.most, of_hull);
    for (int part = tile.begin; part < tile.end; part += extent) {
      const geometry::Span box = {part, geometry::lo(part + extent, tile.end)};
      const geometry::Span seen = geometry::hull(axis, box), whole = geometry::core(axis, box);
      if (seen.empty()) continue;
      const int met = (seen.end - 1 - keys.begin) / tile_kv - (seen.begin - keys.begin) / tile_kv + 1;
      n.seen += 1.0 / parts * met;
      const int first = geometry::ceil_div(geometry::hi(whole.begin - keys.begin, 0), tile_kv);
      const int past = geometry::hi(whole.end - keys.begin, 0) / tile_kv;
      n.whole += 1.0 / parts * geometry::hi(past - first, 0);
    }
  }
  return n;
}

/// Each count is made once, when it is asked for: a search asks for many thousands.
class BoxCounts {
 public:
  using Extent = std::array<int, 3>;

  /// Of one axis of a family, for tiles of so many queries in so many parts: by extents of key tiles.
  struct Axis {
    int tile_q = 0, parts = 0;
    std::vector<std::optional<Counts>> of;
  };
  using Axes = std::vector<Axis*>;  ///< by families, three each

  explicit BoxCounts(const std::vector<Family>& list) : families_(list) {}

  /// For tiles of queries cut into `warpgroups` boxes along `stack_axis`.
  Axes of_rows(const Extent& rows, int stack_axis, int warpgroups) {
    Axes axes;
    for (std::size_t f = 0; f < families_.size(); ++f) {
      for (int a = 0; a < 3; ++a) {
        const int tile_q = rows.at(static_cast<std::size_t>(a)), parts = a == stack_axis ? warpgroups : 1;
        Axis& axis = known_[{f, a, tile_q, parts}];
        axis.tile_q = tile_q;
        axis.parts = parts;
        axes.push_back(&axis);
      }
    }
    return axes;
  }

  /// Over the problem, for tiles of `columns` keys.
  Counts total(const Axes& axes, const Extent& columns) const {
    Counts sum;
    for (std::size_t f = 0; f < families_.size(); ++f) {
      Counts product{families_[f].cells, families_[f].cells, families_[f].cells, 1};
      for (std::size_t a = 0; a < 3; ++a)
        product = product * on_axis(families_[f].axes[a], *axes[3 * f + a], columns[a]);
      sum += product;
    }
    return sum;
  }

 private:
  template <class Classes>
  static const Counts& on_axis(const Classes& classes, Axis& axis, int tile_kv) {
    const auto n = static_cast<std::size_t>(tile_kv);
    if (axis.of.size() <= n) axis.of.resize(n + 1);
    std::optional<Counts>& known = axis.of[n];
    if (!known) {
      Counts sum;
      for (const auto& c : classes) sum += c.count * count_tiles(c.axis, axis.tile_q, axis.parts, tile_kv);
      known = sum;
    }
    return *known;
  }

  const std::vector<Family>& families_;
  std::map<std::tuple<std::size_t, int, int, int>, Axis> known_;  // an entry never moves
};

}  // namespace vicus::gpu

#endif  // VICUS_GPU_BOX_COUNTS_H_
