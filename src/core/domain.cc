#include "core/domain.h"

#include <algorithm>

namespace vicus {
namespace {

using geometry::kRank;

// Axes of the problem are the last ones of the grid.
int grid_axis(const Problem& problem, int axis) { return kRank - problem.rank() + axis; }

geometry::Axis dense_axis(const Dense& mask, std::int64_t queries, std::int64_t keys) {
  const bool causal = mask.causal != Causal::none;
  const std::int64_t offset = mask.causal == Causal::top_left ? 0 : keys - queries;
  return geometry::band_axis(static_cast<int>(queries), static_cast<int>(keys), static_cast<int>(mask.window_left),
                             causal ? 0 : static_cast<int>(mask.window_right), static_cast<int>(offset));
}

}  // namespace

Domain::Domain(const Problem& problem) : problem_(problem), sequences_(problem.batch) {
  if (const auto* dense = std::get_if<Dense>(&problem.mask)) {
    if (dense->packed()) sequences_ = dense->sequences();
    alike_ = dense->cumulative_queries.empty() && dense->key_lengths.empty();
    return;
  }
  const auto& mask = std::get<Neighborhood>(problem.mask);
  for (int i = 0; i < problem.rank(); ++i) {
    // Classes beyond the axis are empty and never enumerated; an empty axis leaves no class at all.
    const std::int64_t count = std::min(mask.dilation[i], problem.layout[i]);
    class_count_[static_cast<std::size_t>(grid_axis(problem, i))] = static_cast<int>(count);
    classes_ *= count;
  }
}

std::pair<std::int64_t, std::int64_t> Domain::cells_of(std::int64_t batch) const {
  const auto* dense = std::get_if<Dense>(&problem_.mask);
  if (dense != nullptr && dense->packed()) return {0, size()};  // of one batch entry
  return {batch * classes_, (batch + 1) * classes_};
}

Cell Domain::cell(std::int64_t index) const {
  Cell cell;
  const std::int64_t sequence = index / classes_;
  if (const auto* dense = std::get_if<Dense>(&problem_.mask)) {
    std::int64_t queries = problem_.layout[0];
    std::int64_t keys = dense->keys;
    if (!dense->cumulative_queries.empty()) {
      const auto s = static_cast<std::size_t>(sequence);
      cell.first_query = dense->cumulative_queries[s];
      cell.first_key = dense->cumulative_keys[s];
      queries = dense->cumulative_queries[s + 1] - cell.first_query;
      keys = dense->cumulative_keys[s + 1] - cell.first_key;
    } else if (dense->packed()) {
      queries = dense->device.max_queries;
      keys = dense->device.max_keys;
    } else {
      cell.batch = sequence;
      if (!dense->key_lengths.empty()) keys = dense->key_lengths[static_cast<std::size_t>(sequence)];
    }
    cell.grid.axis[kRank - 1] = dense_axis(*dense, queries, keys);
    return cell;
  }
  const auto& mask = std::get<Neighborhood>(problem_.mask);
  cell.batch = sequence;
  std::int64_t klass = index % classes_;
  for (int i = problem_.rank() - 1; i >= 0; --i) {
    const int a = grid_axis(problem_, i);
    const auto n = static_cast<std::size_t>(a);
    cell.residue[n] = static_cast<int>(klass % class_count_[n]);
    klass /= class_count_[n];
    // A dilation beyond the axis makes the same classes as one of its length.
    cell.dilation[n] = static_cast<int>(std::min(mask.dilation[i], problem_.layout[i]));
    const int len = geometry::class_len(static_cast<int>(problem_.layout[i]), cell.dilation[n], cell.residue[n]);
    cell.grid.axis[a] = geometry::neighborhood_axis(len, static_cast<int>(mask.kernel_size[i]),
                                                    static_cast<int>(mask.stride[i]), mask.is_causal[i] != 0);
  }
  return cell;
}

RowMap row_map(const TensorLayout& tensor, const Problem& problem, const Cell& cell, std::int64_t first_token) {
  RowMap map;
  map.origin = cell.batch * tensor.stride(0) + first_token * tensor.stride(problem.rank());
  for (int i = 0; i < problem.rank(); ++i) {
    const auto n = static_cast<std::size_t>(grid_axis(problem, i));
    map.origin += cell.residue[n] * tensor.stride(1 + i);
    map.step[n] = cell.dilation[n] * tensor.stride(1 + i);
  }
  map.head_step = tensor.stride(1 + problem.rank());
  return map;
}

RowMap additional_row_map(const TensorLayout& tensor, std::int64_t batch) {
  RowMap map;
  map.origin = batch * tensor.stride(0);
  map.step[kRank - 1] = tensor.stride(1);
  map.head_step = tensor.stride(2);
  return map;
}

RpbMap rpb_map(const TensorLayout& rpb, const Problem& problem) {
  RpbMap map;
  const auto& window = std::get<Neighborhood>(problem.mask).kernel_size;
  for (int i = 0; i < problem.rank(); ++i) {
    map.step[static_cast<std::size_t>(grid_axis(problem, i))] = rpb.stride(1 + i);
    map.origin += (window[i] - 1) * rpb.stride(1 + i);
  }
  return map;
}

}  // namespace vicus
