// Every window of every small axis against the written definition, dilation included.
#include <gtest/gtest.h>

#include "definition.h"
#include "vicus/geometry.h"

namespace vicus {
namespace {

using geometry::Axis;
using geometry::Span;

constexpr int kLongest = 24;

struct Case {
  int n, w, s, d;
  bool causal;
};
std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "length " << c.n << " window " << c.w << " step " << c.s << " dilation " << c.d << " causal "
             << c.causal;
}

// The mask of a whole axis put together from its residue classes.
definition::Mask from_geometry(const Case& c) {
  definition::Mask mask = definition::empty_mask(c.n, c.n);
  for (int residue = 0; residue < c.d; ++residue) {
    const int len = geometry::class_len(c.n, c.d, residue);
    if (len == 0) continue;
    const Axis axis = geometry::neighborhood_axis(len, c.w, c.s, c.causal);
    for (int p = 0; p < len; ++p) {
      const Span keys = geometry::window(axis, p);
      for (int key = keys.begin; key < keys.end; ++key) {
        const int i = geometry::token_of(p, c.d, residue);
        const int j = geometry::token_of(key, c.d, residue);
        if (i >= c.n || j < 0 || j >= c.n) return {};
        definition::at(mask, i, j) = 1;
      }
    }
  }
  return mask;
}

TEST(Window, EveryNeighborhoodUpToLength24MatchesTheDefinition) {
  for (int n = 1; n <= kLongest; ++n) {
    for (int w = 1; w <= n + 2; ++w) {
      for (int s = 1; s <= w; ++s) {
        for (int d = 1; d <= n + 1; ++d) {
          for (const bool causal : {false, true}) {
            const Case c = {n, w, s, d, causal};
            ASSERT_EQ(from_geometry(c), definition::neighborhood(n, w, s, d, causal)) << c;
          }
        }
      }
    }
  }
}

TEST(Window, ResidueClassesCoverTheAxisOnce) {
  for (int n = 0; n <= kLongest; ++n) {
    for (int d = 1; d <= n + 3; ++d) {
      std::vector<int> hits(static_cast<std::size_t>(n), 0);
      for (int residue = 0; residue < d; ++residue) {
        const int len = geometry::class_len(n, d, residue);
        ASSERT_GE(len, 0);
        for (int p = 0; p < len; ++p) {
          const int token = geometry::token_of(p, d, residue);
          ASSERT_LT(token, n);
          ASSERT_EQ(token % d, residue);
          ASSERT_EQ(token / d, p);
          ++hits[static_cast<std::size_t>(token)];
        }
      }
      ASSERT_EQ(hits, std::vector<int>(static_cast<std::size_t>(n), 1)) << "length " << n << " dilation " << d;
    }
  }
}

TEST(Window, EverySmallBandMatchesTheDefinition) {
  for (int queries = 1; queries <= 10; ++queries) {
    for (int keys = 0; keys <= 10; ++keys) {
      for (int left = -1; left <= 12; ++left) {
        for (int right = -1; right <= 12; ++right) {
          for (int offset = -12; offset <= 12; ++offset) {
            const Axis axis = geometry::band_axis(queries, keys, left, right, offset);
            const definition::Mask mask = definition::band(queries, keys, left, right, offset);
            for (int i = 0; i < queries; ++i) {
              const Span seen = geometry::window(axis, i);
              ASSERT_TRUE(0 <= seen.begin && seen.begin <= seen.end && seen.end <= keys);
              for (int j = 0; j < keys; ++j) {
                ASSERT_EQ(seen.contains(j), definition::at(mask, i, j))
                    << queries << " x " << keys << " left " << left << " right " << right << " offset " << offset
                    << " query " << i << " key " << j;
              }
            }
          }
        }
      }
    }
  }
}

// A bound that reaches past both sequences is none; the longest axes stay inside an int.
TEST(Window, LongAxesDoNotOverflow) {
  using geometry::kMaxLen;
  const int last = kMaxLen - 1;
  const Axis wide = geometry::band_axis(kMaxLen, kMaxLen, 0x7fffffff, 0x7fffffff, 0);
  EXPECT_EQ(geometry::window(wide, 5), (Span{0, kMaxLen}));
  const Axis causal = geometry::band_axis(kMaxLen, kMaxLen, -1, 0, 0);
  EXPECT_EQ(geometry::window(causal, last), (Span{0, kMaxLen}));
  EXPECT_EQ(geometry::queries_of(causal, {last, kMaxLen}), (Span{last, kMaxLen}));
  const Axis shifted = geometry::band_axis(1, kMaxLen, -1, 0, kMaxLen - 1);
  EXPECT_EQ(geometry::window(shifted, 0), (Span{0, kMaxLen}));
  const Axis before = geometry::band_axis(kMaxLen, 1, -1, 0, 1 - kMaxLen);
  EXPECT_TRUE(geometry::window(before, 0).empty());
  EXPECT_EQ(geometry::window(before, last), (Span{0, 1}));
  for (const bool is_causal : {false, true}) {
    const Axis axis = geometry::neighborhood_axis(kMaxLen, kMaxLen, kMaxLen, is_causal);
    EXPECT_EQ(geometry::window(axis, last), (Span{0, kMaxLen}));
  }
  const Axis narrow = geometry::neighborhood_axis(kMaxLen, 5, 1, false);
  EXPECT_EQ(geometry::window(narrow, last), (Span{kMaxLen - 5, kMaxLen}));
  EXPECT_EQ(geometry::queries_of(narrow, {last, kMaxLen}), (Span{kMaxLen - 3, kMaxLen}));
  EXPECT_EQ(geometry::class_len(kMaxLen, 7, 3), (kMaxLen - 3 + 6) / 7);
}

}  // namespace
}  // namespace vicus
