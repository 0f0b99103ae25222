// Exact counts of what tiles do, over a whole problem, axis by axis.
#ifndef VICUS_GPU_AXIS_SUMS_H_
#define VICUS_GPU_AXIS_SUMS_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "core/families.h"
#include "vicus/geometry.h"

namespace vicus::gpu {

using Extent = std::array<int, 3>;

/// Sums over an axis of all families, computed once per extents.
class AxisSums {
 public:
  explicit AxisSums(const std::vector<Family>& list) : families_(list) {}

  /// Padded pairs of one head.
  double pairs(const Extent& q, const Extent& kv) {
    return total([&](std::size_t f, int a) { return axis(f, a, q, kv).first; });
  }
  /// Pairs of a query tile and a key tile.
  double visits(const Extent& q, const Extent& kv) {
    return total([&](std::size_t f, int a) { return axis(f, a, q, kv).second; });
  }
  /// Pairs of a warp with the box `warp` of a tile `q` and a key tile `kv` of the tile's hull.
  double meetings(const Extent& q, const Extent& warp, const Extent& kv) {
    return total([&](std::size_t f, int a) { return axis_meetings(f, a, q, warp, kv); });
  }
  /// Most keys per axis that a box of `own` queries sees; or, `of_keys`, most queries that see a box of `own` keys.
  Extent widest_hull(const Extent& own, bool of_keys) {
    Extent widest{1, 1, 1};
    for (std::size_t f = 0; f < families_.size(); ++f) {
      for (std::size_t a = 0; a < widest.size(); ++a) widest[a] = std::max(widest[a], axis_hull(f, a, own[a], of_keys));
    }
    return widest;
  }
  double tiles(const Extent& q) const {
    double n = 0;
    for (const Family& family : families_) {
      n += family.sum([&](int a, const geometry::Axis& axis) {
        return static_cast<double>(geometry::ceil_div(axis.queries, q[static_cast<std::size_t>(a)]));
      });
    }
    return n;
  }

 private:
  template <class Of>
  double total(const Of& of) {
    double n = 0;
    for (std::size_t f = 0; f < families_.size(); ++f) {
      double product = families_[f].cells;
      for (int a = 0; a < geometry::kRank; ++a) product *= of(f, a);
      n += product;
    }
    return n;
  }
  std::pair<double, double> axis(std::size_t f, int a, const Extent& q, const Extent& kv) {
    const auto n = static_cast<std::size_t>(a);
    const auto [place, added] = known_.try_emplace({f, a, q[n], kv[n]});
    if (added) {
      for (const auto& c : families_[f].axes[n]) {
        const auto pairs = static_cast<double>(geometry::tile_pairs(c.axis, q[n], kv[n]));
        place->second.first += c.count * pairs;
        place->second.second += c.count * pairs / (q[n] * kv[n]);
      }
    }
    return place->second;
  }

  double axis_meetings(std::size_t f, int a, const Extent& q, const Extent& warp, const Extent& kv) {
    const auto n = static_cast<std::size_t>(a);
    const auto [place, added] = known_meetings_.try_emplace({f, a, q[n], warp[n], kv[n]});
    if (added) {
      for (const auto& c : families_[f].axes[n]) {
        double count = 0;
        for (int first = 0; first < c.axis.queries; first += warp[n]) {
          const int begin = geometry::hull(c.axis, geometry::tile_span(first / q[n], q[n], c.axis.queries)).begin;
          const geometry::Span seen = geometry::hull(c.axis, {first, geometry::lo(first + warp[n], c.axis.queries)});
          const int met = (seen.end - 1 - begin) / kv[n] - (seen.begin - begin) / kv[n] + 1;
          if (!seen.empty()) count += met;
        }
        place->second += c.count * count;
      }
    }
    return place->second;
  }
  int axis_hull(std::size_t f, std::size_t a, int own, bool of_keys) {
    const auto [place, added] = known_hulls_.try_emplace({f, a, own, of_keys});
    if (added) {
      for (const auto& c : families_[f].axes[a]) {
        const int count = of_keys ? c.axis.keys : c.axis.queries;
        for (int first = 0; first < count; first += own) {
          const geometry::Span box = {first, geometry::lo(first + own, count)};
          place->second = std::max(place->second,
                                   (of_keys ? geometry::queries_of(c.axis, box) : geometry::hull(c.axis, box)).size());
        }
      }
    }
    return place->second;
  }

  const std::vector<Family>& families_;
  std::map<std::tuple<std::size_t, int, int, int>, std::pair<double, double>> known_;
  std::map<std::tuple<std::size_t, int, int, int, int>, double> known_meetings_;
  std::map<std::tuple<std::size_t, std::size_t, int, bool>, int> known_hulls_;
};

}  // namespace vicus::gpu

#endif  // VICUS_GPU_AXIS_SUMS_H_
