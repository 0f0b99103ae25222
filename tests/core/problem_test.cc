// Every rule that `validate` knows: what it fills in, and for each broken rule an error that names the argument.
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "testing.h"

namespace vicus {
namespace {

using testing::dense;
using testing::expect_invalid;
using testing::neighborhood;
using testing::small_dense;
using testing::small_neighborhood;
using Shape = std::vector<std::int64_t>;

constexpr std::int64_t kHuge = std::int64_t{1} << 62;

struct BrokenRule {
  std::string name;
  std::function<void(Problem&)> breaks;  ///< makes a valid problem invalid
  std::string argument, got, allowed;
};

void PrintTo(const BrokenRule& rule, std::ostream* out) { *out << rule.name; }
std::string name_of(const ::testing::TestParamInfo<BrokenRule>& info) { return info.param.name; }

class NeighborhoodRules : public ::testing::TestWithParam<BrokenRule> {};
TEST_P(NeighborhoodRules, AreChecked) {
  Problem p = small_neighborhood();
  ASSERT_NO_THROW((void)validate(p));
  GetParam().breaks(p);
  expect_invalid([&] { (void)validate(p); }, GetParam().argument, GetParam().got, GetParam().allowed);
}

INSTANTIATE_TEST_SUITE_P(
    All, NeighborhoodRules,
    ::testing::Values(
        BrokenRule{"LayoutMissing", [](Problem& p) { p.layout = AxisValues(); }, "layout", "()", "one to three"},
        BrokenRule{"LayoutNegative", [](Problem& p) { p.layout = {6, -1}; }, "layout[1]", "-1", "0 to "},
        BrokenRule{"LayoutTooLong", [](Problem& p) { p.layout = {kHuge, 1}; }, "layout[0]", std::to_string(kHuge),
                   "0 to "},
        BrokenRule{"BatchNegative", [](Problem& p) { p.batch = -1; }, "batch", "-1", "0 to "},
        BrokenRule{"HeadsZero", [](Problem& p) { p.heads = 0; }, "heads", "0", "1 to "},
        BrokenRule{"HeadsNegative", [](Problem& p) { p.heads = -4; }, "heads", "-4", "1 to "},
        BrokenRule{"HeadsKvNoDivisor", [](Problem& p) { p.heads_kv = 3; }, "heads_kv", "3", "a divisor of heads, 4"},
        BrokenRule{"HeadsKvMoreThanHeads", [](Problem& p) { p.heads_kv = 8; }, "heads_kv", "8",
                   "a divisor of heads, 4"},
        BrokenRule{"HeadsKvNegative", [](Problem& p) { p.heads_kv = -2; }, "heads_kv", "-2", "a divisor of heads, 4"},
        BrokenRule{"HeadDimZero", [](Problem& p) { p.head_dim = 0; }, "head_dim", "0", "1 to "},
        BrokenRule{"HeadDimHuge", [](Problem& p) { p.head_dim = kHuge; }, "head_dim", std::to_string(kHuge), "1 to "},
        BrokenRule{"HeadDimVNegative", [](Problem& p) { p.head_dim_v = -1; }, "head_dim_v", "-1", "1 to "},
        BrokenRule{"ScaleNan", [](Problem& p) { p.scale = std::nan(""); }, "scale", "nan", "finite"},
        BrokenRule{"ScaleInfinite", [](Problem& p) { p.scale = std::numeric_limits<double>::infinity(); }, "scale",
                   "inf", "finite"},
        BrokenRule{"AdditionalTokensNegative", [](Problem& p) { p.additional_tokens = -1; }, "additional_tokens", "-1",
                   "0 to "},
        BrokenRule{"TooManyElements",
                   [](Problem& p) {
                     p.batch = 1 << 29;
                     p.layout = {1 << 29, 1 << 29};
                   },
                   "layout", "(536870912, 536870912)", "2^63"},
        BrokenRule{"KernelSizeMissing", [](Problem& p) { neighborhood(p).kernel_size = AxisValues(); }, "kernel_size",
                   "()", "one per token axis: 2"},
        BrokenRule{"KernelSizeOfAnotherRank", [](Problem& p) { neighborhood(p).kernel_size = {3, 3, 3}; },
                   "kernel_size", "(3, 3, 3)", "one per token axis: 2"},
        BrokenRule{"KernelSizeZero", [](Problem& p) { neighborhood(p).kernel_size = {3, 0}; }, "kernel_size[1]", "0",
                   "1 to "},
        BrokenRule{"KernelSizeNegative", [](Problem& p) { neighborhood(p).kernel_size = -3; }, "kernel_size[0]", "-3",
                   "1 to "},
        BrokenRule{"StrideOfAnotherRank", [](Problem& p) { neighborhood(p).stride = {1, 1, 1}; }, "stride", "(1, 1, 1)",
                   "one per token axis: 2"},
        BrokenRule{"StrideZero", [](Problem& p) { neighborhood(p).stride = {0, 1}; }, "stride[0]", "0",
                   "1 to kernel_size, 3"},
        BrokenRule{"StrideBeyondKernelSize", [](Problem& p) { neighborhood(p).stride = {3, 6}; }, "stride[1]", "6",
                   "1 to kernel_size, 5"},
        BrokenRule{"DilationZero", [](Problem& p) { neighborhood(p).dilation = 0; }, "dilation[0]", "0", "1 to "},
        BrokenRule{"DilationOfAnotherRank", [](Problem& p) { neighborhood(p).dilation = {1, 2, 3}; }, "dilation",
                   "(1, 2, 3)", "one per token axis: 2"},
        BrokenRule{"IsCausalTwo", [](Problem& p) { neighborhood(p).is_causal = {0, 2}; }, "is_causal[1]", "2",
                   "0 to 1"},
        BrokenRule{"IsCausalOfAnotherRank", [](Problem& p) { neighborhood(p).is_causal = {1, 1, 1}; }, "is_causal",
                   "(1, 1, 1)", "one per token axis: 2"},
        BrokenRule{"AttnBias", [](Problem& p) { p.attn_bias = true; }, "attn_bias", "given", "dense attention only"}),
    name_of);

class DenseRules : public ::testing::TestWithParam<BrokenRule> {};
TEST_P(DenseRules, AreChecked) {
  Problem p = small_dense();
  ASSERT_NO_THROW((void)validate(p));
  GetParam().breaks(p);
  expect_invalid([&] { (void)validate(p); }, GetParam().argument, GetParam().got, GetParam().allowed);
}

void pack(Problem& p, const Shape& queries, const Shape& keys) {
  p.batch = 1;
  dense(p).cumulative_queries = queries;
  dense(p).cumulative_keys = keys;
}

INSTANTIATE_TEST_SUITE_P(
    All, DenseRules,
    ::testing::Values(
        BrokenRule{"LayoutOfTwoAxes", [](Problem& p) { p.layout = {2, 5}; }, "layout", "(2, 5)", "one axis"},
        BrokenRule{"KeysNegative", [](Problem& p) { dense(p).keys = -1; }, "keys", "-1", "0 to "},
        BrokenRule{"WindowLeft", [](Problem& p) { dense(p).window_left = -2; }, "window_left", "-2", "-1 to "},
        BrokenRule{"WindowRight", [](Problem& p) { dense(p).window_right = -7; }, "window_right", "-7", "-1 to "},
        BrokenRule{"WindowRightOfCausal",
                   [](Problem& p) {
                     dense(p).causal = Causal::bottom_right;
                     dense(p).window_right = 1;
                   },
                   "window_right", "1", "-1 or 0 with a causal mask"},
        BrokenRule{"Rpb", [](Problem& p) { p.rpb = true; }, "rpb", "given", "neighborhood attention only"},
        BrokenRule{"KeyLengthsTooFew", [](Problem& p) { dense(p).key_lengths = {3}; }, "key_lengths", "1 values",
                   "one per batch entry: 2"},
        BrokenRule{"KeyLengthBeyondKeys", [](Problem& p) { dense(p).key_lengths = {3, 13}; }, "key_lengths[1]", "13",
                   "0 to 12"},
        BrokenRule{"KeyLengthNegative", [](Problem& p) { dense(p).key_lengths = {-1, 3}; }, "key_lengths[0]", "-1",
                   "0 to 12"},
        BrokenRule{"PackedBatch",
                   [](Problem& p) {
                     pack(p, {0, 10}, {0, 12});
                     p.batch = 2;
                   },
                   "batch", "2", "1 with packed"},
        BrokenRule{"PackedOnlyQueries", [](Problem& p) { pack(p, {0, 10}, {}); }, "cumulative_keys[0]", "missing", "0"},
        BrokenRule{"PackedOnlyKeys", [](Problem& p) { pack(p, {}, {0, 12}); }, "cumulative_queries[0]", "missing", "0"},
        BrokenRule{"PackedStart", [](Problem& p) { pack(p, {1, 10}, {0, 12}); }, "cumulative_queries[0]", "1", "0"},
        BrokenRule{"PackedDecreases", [](Problem& p) { pack(p, {0, 4, 10}, {0, 13, 12}); }, "cumulative_keys[2]", "12",
                   ">= cumulative_keys[1], 13"},
        BrokenRule{"PackedEnd", [](Problem& p) { pack(p, {0, 4, 9}, {0, 6, 12}); }, "cumulative_queries[2]", "9",
                   "the number of tokens, 10"},
        BrokenRule{"PackedLengthsDiffer", [](Problem& p) { pack(p, {0, 4, 10}, {0, 12}); }, "cumulative_keys",
                   "2 values", "as many as cumulative_queries: 3"},
        BrokenRule{"PackedKeyLengths",
                   [](Problem& p) {
                     pack(p, {0, 10}, {0, 12});
                     dense(p).key_lengths = {5};
                   },
                   "key_lengths", "given", "absent with packed"},
        BrokenRule{"PackedAttnBias",
                   [](Problem& p) {
                     pack(p, {0, 10}, {0, 12});
                     p.attn_bias = true;
                   },
                   "attn_bias", "given", "absent with packed"}),
    name_of);

TEST(Validate, FillsInDefaults) {
  Problem p;
  p.layout = {5, 6, 7};
  p.heads = 3;
  p.head_dim = 16;
  p.mask = Neighborhood{.kernel_size = 3};
  const Problem v = validate(p);
  EXPECT_EQ(v.heads_kv, 3);
  EXPECT_EQ(v.head_dim_v, 16);
  const auto& mask = std::get<Neighborhood>(v.mask);
  EXPECT_EQ(mask.kernel_size, (AxisValues{3, 3, 3}));
  EXPECT_EQ(mask.stride, (AxisValues{1, 1, 1}));
  EXPECT_EQ(mask.dilation, (AxisValues{1, 1, 1}));
  EXPECT_EQ(mask.is_causal, (AxisValues{0, 0, 0}));
  EXPECT_FALSE(v.scale.has_value());
}

TEST(Validate, ChangesNothingTwice) {
  const Problem once = validate(small_neighborhood());
  EXPECT_EQ(validate(once), once);
  const Problem dense_once = validate(small_dense());
  EXPECT_EQ(validate(dense_once), dense_once);
}

TEST(Validate, TakesEdgesOfTheRules) {
  Problem p = small_neighborhood();
  p.batch = 0;
  EXPECT_NO_THROW((void)validate(p)) << "an empty batch";
  p.batch = 1;
  p.layout = {0, 7};
  EXPECT_NO_THROW((void)validate(p)) << "no token";
  p.layout = {1, 1};
  EXPECT_NO_THROW((void)validate(p)) << "a window longer than its axis";
  neighborhood(p).dilation = {100, 100};
  EXPECT_NO_THROW((void)validate(p)) << "a dilation longer than its axis";
  neighborhood(p).stride = neighborhood(p).kernel_size;
  EXPECT_NO_THROW((void)validate(p)) << "stride equal to kernel_size";

  Problem d = small_dense();
  dense(d).keys = 0;
  EXPECT_NO_THROW((void)validate(d)) << "no key";
  d = small_dense();
  dense(d).key_lengths = {0, 12};
  EXPECT_NO_THROW((void)validate(d)) << "a batch entry that is all padding";
  d = small_dense();
  dense(d).causal = Causal::top_left;
  dense(d).window_right = 0;
  dense(d).window_left = 4;
  EXPECT_NO_THROW((void)validate(d)) << "causal says again what window_right = 0 says";
  d = small_dense();
  pack(d, {0, 0, 10, 10}, {0, 5, 5, 12});
  EXPECT_NO_THROW((void)validate(d)) << "packed sequences without queries or keys";
}

TEST(Scale, UnsetIsTheInverseRootOfHeadDim) {
  Problem p = small_neighborhood();
  p.head_dim = 64;
  EXPECT_DOUBLE_EQ(p.effective_scale(), 0.125);
  p.scale = 0.0;
  EXPECT_EQ(p.effective_scale(), 0.0) << "an explicit zero is a zero";
  p.scale = -2.5;
  EXPECT_EQ(p.effective_scale(), -2.5);
}

TEST(Shapes, OfNeighborhoodAttention) {
  Problem p = small_neighborhood();
  p.head_dim_v = 5;
  p.additional_tokens = 3;
  p.rpb = true;
  p = validate(p);
  EXPECT_EQ(p.rank(), 2);
  EXPECT_FALSE(p.dense());
  EXPECT_EQ(p.queries(), 42);
  EXPECT_EQ(p.keys(), 42);
  EXPECT_EQ(p.query_shape(), (Shape{2, 6, 7, 4, 8}));
  EXPECT_EQ(p.key_shape(), (Shape{2, 6, 7, 2, 8}));
  EXPECT_EQ(p.value_shape(), (Shape{2, 6, 7, 2, 5}));
  EXPECT_EQ(p.output_shape(), (Shape{2, 6, 7, 4, 5}));
  EXPECT_EQ(p.logsumexp_shape(), (Shape{2, 6, 7, 4}));
  EXPECT_EQ(p.additional_keys_shape(), (Shape{2, 3, 2, 8}));
  EXPECT_EQ(p.additional_values_shape(), (Shape{2, 3, 2, 5}));
  EXPECT_EQ(p.rpb_shape(), (Shape{4, 5, 9}));
}

TEST(Shapes, OfDenseAttention) {
  Problem p = small_dense();
  p.heads_kv = 1;
  p.head_dim_v = 3;
  p = validate(p);
  EXPECT_TRUE(p.dense());
  EXPECT_EQ(p.queries(), 10);
  EXPECT_EQ(p.keys(), 12);
  EXPECT_EQ(p.query_shape(), (Shape{2, 10, 4, 8}));
  EXPECT_EQ(p.key_shape(), (Shape{2, 12, 1, 8}));
  EXPECT_EQ(p.value_shape(), (Shape{2, 12, 1, 3}));
  EXPECT_EQ(p.output_shape(), (Shape{2, 10, 4, 3}));
  EXPECT_EQ(p.logsumexp_shape(), (Shape{2, 10, 4}));
}

}  // namespace
}  // namespace vicus
