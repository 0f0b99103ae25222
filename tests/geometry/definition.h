// The written definition of the masks, said again in plain loops over tokens and sharing nothing with geometry.h: what
// the exhaustive tests compare with.
#ifndef VICUS_TESTS_GEOMETRY_DEFINITION_H_
#define VICUS_TESTS_GEOMETRY_DEFINITION_H_

#include <algorithm>
#include <cstddef>
#include <vector>

#include "vicus/geometry.h"

namespace vicus::definition {

/// seen[i][j]: query i sees key j.
using Mask = std::vector<std::vector<char>>;

inline Mask empty_mask(int queries, int keys) {
  return Mask(static_cast<std::size_t>(queries), std::vector<char>(static_cast<std::size_t>(keys), 0));
}

inline char& at(Mask& mask, int i, int j) { return mask[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)]; }
inline bool at(const Mask& mask, int i, int j) {
  return mask[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)] != 0;
}

/// Neighborhood of every token of an axis of `n` tokens: window w, step s, dilation d.
inline Mask neighborhood(int n, int w, int s, int d, bool causal) {
  Mask mask = empty_mask(n, n);
  for (int i = 0; i < n; ++i) {
    const int residue = i % d;
    const int position = i / d;
    int length = 0;  // of the residue class
    for (int token = residue; token < n; token += d) ++length;
    const int window = w > length ? length : w;
    int begin = 0;
    int end = 0;
    if (causal) {
      int leader = (position / s) * s + s - 1;
      if (leader > length - 1) leader = length - 1;
      begin = leader - window + 1;
      if (begin < 0) begin = 0;
      end = position + 1;
    } else {
      int leader = (position / s) * s + s / 2;
      if (leader > length - 1) leader = length - 1;
      begin = leader - window / 2;
      if (begin > length - window) begin = length - window;
      if (begin < 0) begin = 0;
      end = begin + window;
    }
    for (int key = begin; key < end; ++key) at(mask, i, key * d + residue) = 1;
  }
  return mask;
}

/// Dense attention: key j with i + offset - left <= j <= i + offset + right; a negative bound is none.
inline Mask band(int queries, int keys, int left, int right, int offset) {
  Mask mask = empty_mask(queries, keys);
  for (int i = 0; i < queries; ++i) {
    for (int j = 0; j < keys; ++j) {
      const bool left_ok = left < 0 || j >= i + offset - left;
      const bool right_ok = right < 0 || j <= i + offset + right;
      at(mask, i, j) = left_ok && right_ok ? 1 : 0;
    }
  }
  return mask;
}

/// Seen pairs in any box of queries and keys, in constant time.
class PairCount {
 public:
  explicit PairCount(const Mask& mask) : queries_(static_cast<int>(mask.size())) {
    keys_ = mask.empty() ? 0 : static_cast<int>(mask[0].size());
    sum_.assign(static_cast<std::size_t>((queries_ + 1) * (keys_ + 1)), 0);
    for (int i = 0; i < queries_; ++i) {
      for (int j = 0; j < keys_; ++j) {
        sum(i + 1, j + 1) = sum(i, j + 1) + sum(i + 1, j) - sum(i, j) + (at(mask, i, j) ? 1 : 0);
      }
    }
  }
  [[nodiscard]] int queries() const { return queries_; }
  [[nodiscard]] int keys() const { return keys_; }
  [[nodiscard]] int operator()(geometry::Span q, geometry::Span k) const {
    return sum(q.end, k.end) - sum(q.begin, k.end) - sum(q.end, k.begin) + sum(q.begin, k.begin);
  }

 private:
  int& sum(int i, int j) { return sum_[static_cast<std::size_t>(i * (keys_ + 1) + j)]; }
  [[nodiscard]] int sum(int i, int j) const { return sum_[static_cast<std::size_t>(i * (keys_ + 1) + j)]; }

  int queries_ = 0, keys_ = 0;
  std::vector<int> sum_;
};

/// Not empty spans inside [0, length).
inline std::vector<geometry::Span> spans(int length) {
  std::vector<geometry::Span> all;
  for (int begin = 0; begin < length; ++begin) {
    for (int end = begin + 1; end <= length; ++end) all.push_back({begin, end});
  }
  return all;
}

/// The shortest span that holds every key that some query of `q` sees; {0, 0} when there is none.
inline geometry::Span seen_by_any(const PairCount& count, geometry::Span q) {
  geometry::Span span;
  for (int j = 0; j < count.keys(); ++j) {
    if (count(q, {j, j + 1}) == 0) continue;
    if (span.empty()) span.begin = j;
    span.end = j + 1;
  }
  return span;
}

/// The shortest span that holds every query that sees some key of `k`; {0, 0} when there is none.
inline geometry::Span that_see_any(const PairCount& count, geometry::Span k) {
  geometry::Span span;
  for (int i = 0; i < count.queries(); ++i) {
    if (count({i, i + 1}, k) == 0) continue;
    if (span.empty()) span.begin = i;
    span.end = i + 1;
  }
  return span;
}

inline geometry::TileClass classify(const PairCount& count, geometry::Span q, geometry::Span k) {
  const int seen = count(q, k);
  if (seen == 0) return geometry::TileClass::empty;
  return seen == q.size() * k.size() ? geometry::TileClass::full : geometry::TileClass::partial;
}

}  // namespace vicus::definition

#endif  // VICUS_TESTS_GEOMETRY_DEFINITION_H_
