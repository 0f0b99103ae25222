// Numbering of tasks over cells that hold different numbers of them.
#ifndef VICUS_CPU_CELL_TASKS_H_
#define VICUS_CPU_CELL_TASKS_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/domain.h"

namespace vicus::cpu {

/// Task t belongs to one cell and is number `local` in it. Where all sequences are alike, every cell gets as many as the
/// first, which is the largest: residue classes differ by one position at most, and a task may find nothing to do.
/// Otherwise (packed or padded sequences) cells are counted one by one, in 8 bytes each.
class CellTasks {
 public:
  CellTasks() = default;
  /// `count(cell)`: tasks of a cell.
  template <class Count>
  CellTasks(const Domain& domain, const Count& count) {
    const std::int64_t differing = domain.differing_cells();
    if (differing == domain.size() && differing > 1) {
      ends_.reserve(static_cast<std::size_t>(differing));
      for (std::int64_t i = 0; i < differing; ++i) ends_.push_back(total_ += count(domain.cell(i)));
    } else if (differing > 0) {
      each_ = count(domain.cell(0));
      total_ = each_ * domain.size();
    }
  }

  [[nodiscard]] std::int64_t total() const { return total_; }

  struct Place {
    std::int64_t cell, local;
  };
  [[nodiscard]] Place locate(std::int64_t task) const {
    if (ends_.empty()) return {task / each_, task % each_};
    const auto end = std::upper_bound(ends_.begin(), ends_.end(), task);
    const std::int64_t begin = end == ends_.begin() ? 0 : *(end - 1);
    return {end - ends_.begin(), task - begin};
  }

 private:
  std::int64_t each_ = 0, total_ = 0;
  std::vector<std::int64_t> ends_;
};

}  // namespace vicus::cpu

#endif  // VICUS_CPU_CELL_TASKS_H_
