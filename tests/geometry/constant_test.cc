// geometry.h at compile time: the same functions in constant expressions, worked by hand.
#include <gtest/gtest.h>

#include "vicus/geometry.h"

namespace vicus::geometry {
namespace {

constexpr Axis kNine = neighborhood_axis(9, 5, 1, false);
static_assert(window(kNine, 0) == Span{0, 5});
static_assert(window(kNine, 4) == Span{2, 7});
static_assert(window(kNine, 8) == Span{4, 9});
static_assert(window(neighborhood_axis(9, 4, 1, false), 4) == Span{2, 6});  // even: one more to the left
static_assert(window(neighborhood_axis(9, 5, 3, false), 3) == Span{2, 7});  // leader 4 for queries 3, 4, 5
static_assert(window(neighborhood_axis(9, 5, 3, false), 5) == Span{2, 7});
static_assert(window(neighborhood_axis(9, 5, 3, true), 3) == Span{1, 4});  // leader 5
static_assert(window(neighborhood_axis(9, 50, 7, false), 3) == Span{0, 9});
static_assert(hull(kNine, {3, 6}) == Span{1, 8});
static_assert(core(kNine, {3, 6}) == Span{3, 6});
static_assert(queries_of(kNine, {0, 1}) == Span{0, 3});
static_assert(queries_of(kNine, {8, 9}) == Span{6, 9});
static_assert(first_beginning_at(kNine, 0) == 0);
static_assert(first_beginning_at(kNine, 4) == 6);
static_assert(first_beginning_at(kNine, 5) == 9);                              // no window does
static_assert(first_beginning_at(neighborhood_axis(9, 5, 3, false), 1) == 3);  // leader 4
static_assert(first_beginning_at(neighborhood_axis(9, 5, 3, true), 2) == 6);   // leader 8
static_assert(first_beginning_at(band_axis(9, 9, 2, 0, 1), 3) == 4);           // 4 + 1 - 2
static_assert(classify(kNine, {3, 6}, {3, 6}) == TileClass::full);
static_assert(classify(kNine, {3, 6}, {2, 6}) == TileClass::partial);
static_assert(classify(kNine, {3, 6}, {8, 9}) == TileClass::empty);
static_assert(mask_pairs(kNine) == 45);
static_assert(tile_pairs(kNine, 3, 1) == 3 * (5 + 7 + 5));

constexpr Axis kCausal = band_axis(4, 6, -1, 0, 2);
static_assert(window(kCausal, 0) == Span{0, 3});
static_assert(window(kCausal, 3) == Span{0, 6});
static_assert(mask_pairs(kCausal) == 3 + 4 + 5 + 6);
static_assert(window(band_axis(6, 4, -1, 0, -2), 1).empty());
static_assert(tile_counts(kCausal, 2, 3).full == 2 && tile_counts(kCausal, 2, 3).partial == 2);

static_assert(class_len(10, 3, 0) == 4 && class_len(10, 3, 2) == 3 && class_len(2, 5, 3) == 0);
static_assert(token_of(2, 3, 1) == 7);
static_assert(tile_span(2, 4, 10) == Span{8, 10});

constexpr Grid kGrid = {{kNine, kNine, kCausal}};
constexpr Box kTile = {{{3, 6}, {3, 6}, {3, 4}}};
static_assert(hull(kGrid, kTile) == Box{{{1, 8}, {1, 8}, {0, 6}}});
static_assert(classify(kGrid, kTile, Box{{{3, 6}, {3, 6}, {0, 6}}}) == TileClass::full);
static_assert(classify(kGrid, kTile, Box{{{3, 6}, {3, 7}, {0, 6}}}) == TileClass::partial);
static_assert(kTile.volume() == 9);

// The static_asserts are the test; this names them in the report.
TEST(Constants, HoldAtCompileTime) { EXPECT_EQ(mask_pairs(kNine), 45); }

}  // namespace
}  // namespace vicus::geometry
