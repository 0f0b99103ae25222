// Exact counts over a whole problem without visiting every cell: cells whose axes are equal are counted once. Where only the
// calls know the lengths of sequences (Dense::device), counts are those of full lengths: as many sequences of the longest
// lengths as there are tokens for, and no padding among the keys.
#ifndef VICUS_CORE_FAMILIES_H_
#define VICUS_CORE_FAMILIES_H_

#include <array>
#include <vector>

#include "vicus/geometry.h"
#include "vicus/problem.h"

namespace vicus {

/// A set of cells that is a product: `cells` times every choice of one axis out of each list.
struct Family {
  struct AxisClass {
    geometry::Axis axis;
    double count = 1;  ///< residue classes with this axis
  };
  double cells = 1;
  std::array<std::vector<AxisClass>, geometry::kRank> axes;

  /// Sum over the cells of a quantity that is a product over axes; `of(a, axis)` is its factor on axis `a`.
  template <class Of>
  [[nodiscard]] double sum(const Of& of) const {
    double product = cells;
    for (int a = 0; a < geometry::kRank; ++a) {
      double total = 0;
      for (const AxisClass& c : axes[static_cast<std::size_t>(a)]) total += c.count * of(a, c.axis);
      product *= total;
    }
    return product;
  }
};

[[nodiscard]] std::vector<Family> families(const Problem& problem);

}  // namespace vicus

#endif  // VICUS_CORE_FAMILIES_H_
