// Everything derived from windows on one axis (hull, core, queries_of, classify, counts) against enumeration, for every
// span of queries and keys of every small axis.
#include <gtest/gtest.h>

#include <string>

#include "definition.h"
#include "vicus/geometry.h"

namespace vicus {
namespace {

using definition::PairCount;
using geometry::Axis;
using geometry::Count;
using geometry::Span;
using geometry::TileClass;

constexpr int kLongest = 24;

// Compares everything that takes a span. gtest's ASSERT is slow in the innermost loop, so that one counts mismatches.
void check_spans(const Axis& axis, const PairCount& count, const std::string& what) {
  const std::vector<Span> all_q = definition::spans(axis.queries);
  const std::vector<Span> all_k = definition::spans(axis.keys);
  for (const Span q : all_q) {
    const Span want = definition::seen_by_any(count, q);
    const Span hull = geometry::hull(axis, q);
    ASSERT_TRUE(want.empty() ? hull.empty() : hull == want) << what << " hull of " << q.begin << ".." << q.end;
    const Span core = geometry::core(axis, q);
    for (int j = 0; j < axis.keys; ++j) {
      ASSERT_EQ(core.contains(j), count(q, {j, j + 1}) == q.size()) << what << " core of " << q.begin << ".." << q.end;
    }
  }
  for (const Span k : all_k) {
    const Span want = definition::that_see_any(count, k);
    const Span queries = geometry::queries_of(axis, k);
    ASSERT_TRUE(want.empty() ? queries.empty() : queries == want) << what << " queries of " << k.begin << ".." << k.end;
    const Span all = geometry::queries_of_all(axis, k);
    for (int i = 0; i < axis.queries; ++i) {
      ASSERT_EQ(all.contains(i), count({i, i + 1}, k) == k.size())
          << what << " queries of all " << k.begin << ".." << k.end;
    }
    // One span: every query inside it sees some key of k.
    for (int i = want.begin; i < want.end; ++i) ASSERT_GT(count({i, i + 1}, k), 0) << what;
  }
  int wrong = 0;
  for (const Span q : all_q) {
    for (const Span k : all_k) {
      wrong += geometry::classify(axis, q, k) != definition::classify(count, q, k) ? 1 : 0;
    }
  }
  ASSERT_EQ(wrong, 0) << what << ": boxes with a wrong class";
}

void check_counts(const Axis& axis, const PairCount& count, const std::string& what) {
  ASSERT_EQ(geometry::mask_pairs(axis), count({0, axis.queries}, {0, axis.keys})) << what;
  for (const int tile_q : {1, 2, 3, 5, 8, 24, 40}) {
    for (const int tile_kv : {1, 2, 4, 7, 16, 30}) {
      Count pairs = 0;
      geometry::TileCounts tiles;
      for (int q = 0; q < axis.queries; q += tile_q) {
        const Span rows = {q, std::min(q + tile_q, axis.queries)};
        const int hull = definition::seen_by_any(count, rows).size();
        int cover = 0;
        while (cover < hull) cover += tile_kv;
        pairs += static_cast<Count>(tile_q) * cover;
        for (int k = 0; k < axis.keys; k += tile_kv) {
          switch (definition::classify(count, rows, {k, std::min(k + tile_kv, axis.keys)})) {
            case TileClass::empty:
              ++tiles.empty;
              break;
            case TileClass::partial:
              ++tiles.partial;
              break;
            case TileClass::full:
              ++tiles.full;
              break;
          }
        }
      }
      const geometry::TileCounts got = geometry::tile_counts(axis, tile_q, tile_kv);
      ASSERT_EQ(geometry::tile_pairs(axis, tile_q, tile_kv), pairs) << what << " tiles " << tile_q << " x " << tile_kv;
      ASSERT_EQ(got.empty, tiles.empty) << what << " tiles " << tile_q << " x " << tile_kv;
      ASSERT_EQ(got.partial, tiles.partial) << what << " tiles " << tile_q << " x " << tile_kv;
      ASSERT_EQ(got.full, tiles.full) << what << " tiles " << tile_q << " x " << tile_kv;
    }
  }
}

// Windows, steps and the causal flag of one length; one test per length, so that they run side by side.
class Neighborhoods : public testing::TestWithParam<int> {};

TEST_P(Neighborhoods, SpansAndCounts) {
  const int n = GetParam();
  for (int w = 1; w <= n + 2; ++w) {
    for (int s = 1; s <= w; ++s) {
      for (const bool causal : {false, true}) {
        const std::string what = "length " + std::to_string(n) + " window " + std::to_string(w) + " step " +
                                 std::to_string(s) + (causal ? " causal" : "");
        const PairCount count(definition::neighborhood(n, w, s, 1, causal));
        const Axis axis = geometry::neighborhood_axis(n, w, s, causal);
        check_spans(axis, count, what);
        check_counts(axis, count, what);
        if (HasFatalFailure()) return;
      }
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Length, Neighborhoods, testing::Range(1, kLongest + 1));

class Bands : public testing::TestWithParam<int> {};

TEST_P(Bands, SpansAndCounts) {
  const int queries = GetParam();
  for (int keys = 1; keys <= 9; ++keys) {
    for (int left = -1; left <= 10; ++left) {
      for (int right = -1; right <= 10; ++right) {
        for (int offset = -10; offset <= 10; ++offset) {
          const std::string what = std::to_string(queries) + " x " + std::to_string(keys) + " left " +
                                   std::to_string(left) + " right " + std::to_string(right) + " offset " +
                                   std::to_string(offset);
          const PairCount count(definition::band(queries, keys, left, right, offset));
          const Axis axis = geometry::band_axis(queries, keys, left, right, offset);
          check_spans(axis, count, what);
          if (HasFatalFailure()) return;
        }
        const int offset = keys - queries;
        check_counts(geometry::band_axis(queries, keys, left, right, offset),
                     PairCount(definition::band(queries, keys, left, right, offset)), std::to_string(queries));
        if (HasFatalFailure()) return;
      }
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Queries, Bands, testing::Range(1, 10));

TEST(Spans, EmptyOnesSeeNothing) {
  const Axis axis = geometry::neighborhood_axis(10, 5, 2, false);
  const Span none = {4, 4};
  EXPECT_TRUE(geometry::hull(axis, none).empty());
  EXPECT_TRUE(geometry::queries_of(axis, none).empty());
  EXPECT_EQ(geometry::core(axis, none), (Span{0, 10}));
  EXPECT_EQ(geometry::classify(axis, none, {0, 10}), TileClass::empty);
  EXPECT_EQ(geometry::classify(axis, {0, 10}, none), TileClass::empty);
  EXPECT_TRUE(none.contains(none));
  EXPECT_FALSE(none.contains(4));
  EXPECT_TRUE(geometry::intersect(Span{0, 3}, Span{5, 9}).empty());
}

TEST(Spans, TilesCoverAnAxisOnce) {
  for (int len = 0; len <= kLongest; ++len) {
    for (int extent = 1; extent <= len + 3; ++extent) {
      int next = 0;
      for (int index = 0; index < geometry::ceil_div(len, extent); ++index) {
        const Span tile = geometry::tile_span(index, extent, len);
        ASSERT_EQ(tile.begin, next);
        ASSERT_TRUE(tile.size() == extent || tile.end == len);
        ASSERT_FALSE(tile.empty());
        next = tile.end;
      }
      ASSERT_EQ(next, len);
      ASSERT_TRUE(geometry::tile_span(geometry::ceil_div(len, extent), extent, len).empty());
    }
  }
}

}  // namespace
}  // namespace vicus
