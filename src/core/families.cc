#include "core/families.h"

#include <algorithm>
#include <map>
#include <utility>

#include "core/domain.h"

namespace vicus {
namespace {

// How many sequences of the longest lengths there can be: what work is counted for where only the calls know lengths.
double longest_sequences(const Problem& problem, const Dense& mask) {
  const auto fit = [](std::int64_t tokens, std::int64_t longest) {
    return static_cast<double>(tokens) / static_cast<double>(std::max<std::int64_t>(longest, 1));
  };
  return std::min({static_cast<double>(mask.device.sequences), fit(problem.queries(), mask.device.max_queries),
                   fit(mask.keys, mask.device.max_keys)});
}

}  // namespace

std::vector<Family> families(const Problem& problem) {
  const Domain domain(problem);
  if (domain.size() == 0) return {};
  if (problem.dense()) {
    // Sequences of equal lengths, in the order they first appear.
    std::vector<Family> list;
    std::map<std::pair<int, int>, std::size_t> known;
    const std::int64_t differing = domain.differing_cells();
    for (std::int64_t i = 0; i < differing; ++i) {
      const geometry::Grid grid = domain.cell(i).grid;
      const auto [place, added] = known.try_emplace({grid.axis[2].queries, grid.axis[2].keys}, list.size());
      if (added) {
        Family family;
        family.cells = 0;
        for (std::size_t a = 0; a < 3; ++a) family.axes[a] = {{grid.axis[a], 1}};
        list.push_back(std::move(family));
      }
      list[place->second].cells += static_cast<double>(domain.size()) / static_cast<double>(differing);
    }
    const auto& dense = std::get<Dense>(problem.mask);
    if (dense.device.sequences > 0) list.front().cells = longest_sequences(problem, dense);
    return list;
  }
  // Residue classes of one axis have one of two lengths: that of class 0, and that of the last class.
  Family family;
  family.cells = static_cast<double>(problem.batch);
  const auto& mask = std::get<Neighborhood>(problem.mask);
  const geometry::Grid first = domain.cell(0).grid;
  for (int a = 0; a < geometry::kRank; ++a) {
    auto& list = family.axes[static_cast<std::size_t>(a)];
    const int i = a - (geometry::kRank - problem.rank());
    const geometry::Axis longest = first.axis[a];
    if (i < 0) {
      list = {{longest, 1}};
      continue;
    }
    const auto len = static_cast<int>(problem.layout[i]);
    const auto dilation = geometry::lo(static_cast<int>(mask.dilation[i]), len);
    // Classes r < len - (longest - 1) * dilation are the long ones.
    const int long_classes = len - (longest.queries - 1) * dilation;
    list = {{longest, static_cast<double>(long_classes)}};
    if (long_classes < dilation) {
      geometry::Axis shorter = longest;
      shorter.queries = shorter.keys = geometry::class_len(len, dilation, dilation - 1);
      list.push_back({shorter, static_cast<double>(dilation - long_classes)});
    }
  }
  return {family};
}

}  // namespace vicus
