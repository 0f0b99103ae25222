// Several axes at once: boxes against an enumeration of the product mask.
#include <gtest/gtest.h>

#include <array>
#include <random>

#include "definition.h"
#include "vicus/geometry.h"

namespace vicus {
namespace {

using definition::Mask;
using geometry::Box;
using geometry::Grid;
using geometry::Span;
using geometry::TileClass;

struct Sample {
  Grid grid;
  std::array<Mask, 3> mask;
};

Sample random_grid(std::mt19937& random) {
  const auto upto = [&](int least, int most) { return std::uniform_int_distribution<int>(least, most)(random); };
  Sample sample;
  for (int a = 0; a < geometry::kRank; ++a) {
    if (upto(0, 4) == 0) {
      const int queries = upto(1, 5), keys = upto(1, 5), left = upto(-1, 3), right = upto(-1, 3), offset = upto(-4, 4);
      sample.grid.axis[a] = geometry::band_axis(queries, keys, left, right, offset);
      sample.mask[static_cast<std::size_t>(a)] = definition::band(queries, keys, left, right, offset);
    } else {
      const int n = upto(1, 5), w = upto(1, 6), s = upto(1, w);
      const bool causal = upto(0, 1) == 1;
      sample.grid.axis[a] = geometry::neighborhood_axis(n, w, s, causal);
      sample.mask[static_cast<std::size_t>(a)] = definition::neighborhood(n, w, s, 1, causal);
    }
  }
  return sample;
}

// Pairs of the box q x k that all three axes let through.
long long seen_pairs(const Sample& sample, const Box& q, const Box& k) {
  long long seen = 0;
  const Span* i = q.axis;
  const Span* j = k.axis;
  for (int i0 = i[0].begin; i0 < i[0].end; ++i0)
    for (int i1 = i[1].begin; i1 < i[1].end; ++i1)
      for (int i2 = i[2].begin; i2 < i[2].end; ++i2)
        for (int j0 = j[0].begin; j0 < j[0].end; ++j0)
          for (int j1 = j[1].begin; j1 < j[1].end; ++j1)
            for (int j2 = j[2].begin; j2 < j[2].end; ++j2)
              seen += definition::at(sample.mask[0], i0, j0) && definition::at(sample.mask[1], i1, j1) &&
                      definition::at(sample.mask[2], i2, j2);
  return seen;
}

TEST(Grids, RandomBoxesOfRandomGridsMatchTheProductMask) {
  constexpr unsigned kSeed = 20240229;
  std::mt19937 random(kSeed);
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::array<int, 3> classes{};
  for (int round = 0; round < 200000; ++round) {
    const Sample sample = random_grid(random);
    const auto box = [&](bool of_queries) {
      Box b;
      for (int a = 0; a < geometry::kRank; ++a) {
        const int len = of_queries ? sample.grid.axis[a].queries : sample.grid.axis[a].keys;
        const int begin = std::uniform_int_distribution<int>(0, len - 1)(random);
        b.axis[a] = {begin, std::uniform_int_distribution<int>(begin + 1, len)(random)};
      }
      return b;
    };
    const Box q = box(true), k = box(false);
    const long long seen = seen_pairs(sample, q, k);
    const TileClass want = seen == 0                         ? TileClass::empty
                           : seen == q.volume() * k.volume() ? TileClass::full
                                                             : TileClass::partial;
    ASSERT_EQ(geometry::classify(sample.grid, q, k), want) << "round " << round;
    ++classes[static_cast<std::size_t>(want)];

    // Hull and queries_of are the boxes of the axes: nothing seen lies outside, and every face is needed.
    const Box hull = geometry::hull(sample.grid, q);
    const Box queries = geometry::queries_of(sample.grid, k);
    for (int a = 0; a < geometry::kRank; ++a) {
      const definition::PairCount count(sample.mask[static_cast<std::size_t>(a)]);
      const Span keys_a = definition::seen_by_any(count, q.axis[a]);
      const Span queries_a = definition::that_see_any(count, k.axis[a]);
      ASSERT_TRUE(keys_a.empty() ? hull.axis[a].empty() : hull.axis[a] == keys_a) << "round " << round;
      ASSERT_TRUE(queries_a.empty() ? queries.axis[a].empty() : queries.axis[a] == queries_a) << "round " << round;
    }
    Box everything;
    for (int a = 0; a < geometry::kRank; ++a) everything.axis[a] = {0, sample.grid.axis[a].keys};
    ASSERT_EQ(seen_pairs(sample, q, hull), seen_pairs(sample, q, everything)) << "round " << round;
  }
  for (const int hits : classes) EXPECT_GT(hits, 5000);  // the sample reaches every class
}

TEST(Grids, BoxesCountAndIntersect) {
  const Box a = {{{0, 4}, {2, 5}, {1, 3}}};
  const Box b = {{{3, 9}, {0, 3}, {1, 2}}};
  EXPECT_EQ(a.volume(), 24);
  EXPECT_EQ(geometry::intersect(a, b), (Box{{{3, 4}, {2, 3}, {1, 2}}}));
  EXPECT_EQ(geometry::intersect(a, b), geometry::intersect(b, a));
  const Box apart = {{{7, 9}, {0, 3}, {1, 2}}};
  EXPECT_TRUE(geometry::intersect(a, apart).empty());
  EXPECT_EQ(geometry::intersect(a, apart).volume(), 0);
  EXPECT_FALSE(a == b);
  const int big = 1 << 20;
  EXPECT_EQ((Box{{{0, big}, {0, big}, {0, big}}}).volume(), 1LL << 60);
}

}  // namespace
}  // namespace vicus
