// Numbers of a plan against a count by enumeration that shares no code with the library.
#include <algorithm>
#include <array>
#include <cstdint>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "testing.h"

namespace vicus {
namespace {

using testing::dense;
using testing::expect_invalid;
using testing::neighborhood;
using testing::small_dense;
using testing::small_neighborhood;

// --- The written definition, slowly. --------------------------------------------------------------------------------

/// Keys that token `i` of an axis of `n` sees.
std::int64_t keys_seen(std::int64_t i, std::int64_t n, std::int64_t w, std::int64_t s, std::int64_t d, bool causal) {
  std::vector<std::int64_t> own;  // tokens of the residue class
  for (std::int64_t j = i % d; j < n; j += d) own.push_back(j);
  const auto len = static_cast<std::int64_t>(own.size());
  const std::int64_t p = i / d;
  std::int64_t seen = 0;
  if (causal) {
    const std::int64_t leader = std::min(p / s * s + s - 1, len - 1);
    for (std::int64_t k = 0; k < len; ++k) seen += k <= p && k > leader - w;
    return seen;
  }
  return std::min(w, len);
}

double pairs_of_neighborhood(const Problem& p) {
  const auto& mask = std::get<Neighborhood>(p.mask);
  double pairs = 1;
  for (int axis = 0; axis < p.rank(); ++axis) {
    std::int64_t n = 0;
    for (std::int64_t i = 0; i < p.layout[axis]; ++i) {
      n += keys_seen(i, p.layout[axis], mask.kernel_size[axis], mask.stride[axis], mask.dilation[axis],
                     mask.is_causal[axis] != 0);
    }
    pairs *= static_cast<double>(n);
  }
  return pairs;
}

/// Pairs of one sequence of `sq` queries and `sk` keys.
std::int64_t pairs_of_sequence(const Dense& mask, std::int64_t sq, std::int64_t sk) {
  std::int64_t pairs = 0;
  const std::int64_t shift = mask.causal == Causal::top_left ? 0 : sk - sq;
  for (std::int64_t i = 0; i < sq; ++i) {
    for (std::int64_t j = 0; j < sk; ++j) {
      const bool in_order = mask.causal == Causal::none || j <= i + shift;
      const bool left = mask.window_left < 0 || j >= i + shift - mask.window_left;
      const bool right = mask.window_right < 0 || j <= i + shift + mask.window_right;
      pairs += in_order && left && right;
    }
  }
  return pairs;
}

/// Pairs of the mask over batch and heads, additional tokens included.
double pairs_by_enumeration(const Problem& p) {
  double pairs = 0;
  if (!p.dense()) {
    pairs = static_cast<double>(p.batch) * pairs_of_neighborhood(p);
  } else {
    const auto& mask = std::get<Dense>(p.mask);
    if (mask.cumulative_queries.empty()) {
      for (std::int64_t b = 0; b < p.batch; ++b) {
        const std::int64_t keys = mask.key_lengths.empty() ? mask.keys : mask.key_lengths[static_cast<std::size_t>(b)];
        pairs += static_cast<double>(pairs_of_sequence(mask, p.queries(), keys));
      }
    } else {
      const auto &cq = mask.cumulative_queries, &ck = mask.cumulative_keys;
      for (std::size_t s = 1; s < cq.size(); ++s) {
        pairs += static_cast<double>(pairs_of_sequence(mask, cq[s] - cq[s - 1], ck[s] - ck[s - 1]));
      }
    }
  }
  pairs += static_cast<double>(p.batch * p.queries() * p.additional_tokens);
  return pairs * static_cast<double>(p.heads);
}

// --- Problems of every kind. ----------------------------------------------------------------------------------------

struct Named {
  std::string name;
  Problem problem;
};
void PrintTo(const Named& named, std::ostream* out) { *out << named.name; }

Named window(const std::string& name, const AxisValues& layout, const Neighborhood& mask) {
  Problem p = small_neighborhood();
  p.layout = layout;
  p.mask = mask;
  return {name, validate(p)};
}

template <class Edit>
Named edited(const std::string& name, Problem p, const Edit& edit) {
  edit(p);
  return {name, validate(p)};
}

std::vector<Named> problems() {
  return {
      window("OneAxis", {97}, {.kernel_size = 13}),
      window("OneAxisLong", {3000}, {.kernel_size = 255, .stride = 4}),
      window("OneAxisCausal", {97}, {.kernel_size = 12, .stride = 5, .is_causal = 1}),
      window("TwoAxes", {28, 31}, {.kernel_size = {7, 5}}),
      window("TwoAxesEven", {28, 31}, {.kernel_size = {8, 4}, .stride = {2, 3}}),
      window("Dilated", {28, 31}, {.kernel_size = {7, 3}, .dilation = {3, 8}}),
      window("WindowBeyondClass", {9, 5}, {.kernel_size = {7, 7}, .stride = {1, 2}, .dilation = {2, 3}}),
      window("ThreeAxes", {6, 9, 10}, {.kernel_size = {3, 5, 7}, .stride = {1, 2, 1}, .is_causal = {1, 0, 0}}),
      window("WholeAxes", {12, 12}, {.kernel_size = 12}),
      edited("AdditionalTokens", small_neighborhood(), [](Problem& p) { p.additional_tokens = 5; }),
      edited("Rpb", small_neighborhood(), [](Problem& p) { p.rpb = true; }),
      edited("GroupedHeads", small_neighborhood(),
             [](Problem& p) {
               p.heads = 12;
               p.heads_kv = 3;
             }),
      edited("OddHeadDims", small_neighborhood(),
             [](Problem& p) {
               p.head_dim = 37;
               p.head_dim_v = 3;
             }),
      edited("Float64", small_neighborhood(), [](Problem& p) { p.dtype = DType::float64; }),
      edited("BFloat16", small_neighborhood(), [](Problem& p) { p.dtype = DType::bfloat16; }),
      edited("OneToken", small_neighborhood(), [](Problem& p) { p.layout = {1, 1}; }),
      edited("EmptyBatch", small_neighborhood(), [](Problem& p) { p.batch = 0; }),
      edited("EmptyAxis", small_neighborhood(), [](Problem& p) { p.layout = {0, 7}; }),
      edited("Dense", small_dense(), [](Problem&) {}),
      edited("DenseCausalTopLeft", small_dense(), [](Problem& p) { dense(p).causal = Causal::top_left; }),
      edited("DenseCausalBottomRight", small_dense(), [](Problem& p) { dense(p).causal = Causal::bottom_right; }),
      edited("DenseFewKeysBottomRight", small_dense(),
             [](Problem& p) {
               dense(p).keys = 4;  // queries before the first key see nothing
               dense(p).causal = Causal::bottom_right;
             }),
      edited("DenseSliding", small_dense(),
             [](Problem& p) {
               p.layout = 200;
               dense(p).keys = 210;
               dense(p).window_left = 17;
               dense(p).window_right = 3;
             }),
      edited("DenseSlidingCausal", small_dense(),
             [](Problem& p) {
               dense(p).causal = Causal::top_left;
               dense(p).window_left = 2;
             }),
      edited("DenseKeyLengths", small_dense(),
             [](Problem& p) {
               dense(p).key_lengths = {0, 7};
               dense(p).causal = Causal::bottom_right;
             }),
      edited("DenseAttnBias", small_dense(), [](Problem& p) { p.attn_bias = true; }),
      edited("DenseNoKeys", small_dense(), [](Problem& p) { dense(p).keys = 0; }),
      edited("Packed", small_dense(),
             [](Problem& p) {
               p.batch = 1;
               p.additional_tokens = 2;
               dense(p).cumulative_queries = {0, 3, 3, 10};
               dense(p).cumulative_keys = {0, 5, 8, 12};
               dense(p).causal = Causal::bottom_right;
             }),
  };
}

class Numbers : public ::testing::TestWithParam<Named> {};
INSTANTIATE_TEST_SUITE_P(All, Numbers, ::testing::ValuesIn(problems()),
                         [](const auto& test) { return test.param.name; });

TEST_P(Numbers, PairsAndFlopsAreExact) {
  const Problem& p = GetParam().problem;
  const double pairs = pairs_by_enumeration(p);
  const auto d = static_cast<double>(p.head_dim), dv = static_cast<double>(p.head_dim_v);
  for (const Engine engine : {Engine::reference, Engine::cpu}) {
    const Plan plan = choose_plan(p, {.engine = engine});
    EXPECT_EQ(plan.engine, engine);
    EXPECT_EQ(plan.problem, p);
    EXPECT_EQ(plan.mask_pairs, pairs);
    EXPECT_EQ(plan.forward_flops, 2 * (d + dv) * pairs);
    EXPECT_EQ(plan.backward_flops, 2 * (3 * d + 2 * dv) * pairs);
  }
}

TEST_P(Numbers, TilesCoverTheMask) {
  const Plan plan = choose_plan(GetParam().problem, {.engine = Engine::cpu});
  const double pairs = pairs_by_enumeration(plan.problem);
  EXPECT_EQ(plan.forward.work.mask_pairs, pairs);
  EXPECT_EQ(plan.backward.work.mask_pairs, pairs);
  EXPECT_GE(plan.forward.work.tile_pairs, pairs);
  EXPECT_GE(plan.backward.work.tile_pairs, pairs);
  EXPECT_GE(plan.forward.work.ratio(), 1.0);
  for (const QueryTile& tile : {plan.forward.tile, plan.backward.tile}) {
    EXPECT_TRUE(tile.rows == 16 || tile.rows == 32 || tile.rows == 64) << tile.rows;
    EXPECT_GE(tile.heads, 1);
    EXPECT_LE(tile.heads * tile.extent[0] * tile.extent[1] * tile.extent[2], tile.rows);
    EXPECT_GE(std::min({tile.extent[0], tile.extent[1], tile.extent[2]}), 1);
    EXPECT_LE(tile.heads, plan.problem.heads / plan.problem.heads_kv) << "heads of one group only";
  }
}

TEST_P(Numbers, CandidatesAreSortedAndTheFirstIsTaken) {
  const Plan plan = choose_plan(GetParam().problem, {.engine = Engine::cpu});
  ASSERT_FALSE(plan.candidates.empty());
  EXPECT_TRUE(std::is_sorted(plan.candidates.begin(), plan.candidates.end(),
                             [](const TileCandidate& a, const TileCandidate& b) { return a.cost < b.cost; }));
  EXPECT_EQ(plan.candidates.front().tile.extent, plan.forward.tile.extent);
  EXPECT_EQ(plan.candidates.front().tile.rows, plan.forward.tile.rows);
  EXPECT_EQ(plan.candidates.front().tile.heads, plan.forward.tile.heads);
}

TEST_P(Numbers, ScratchStaysUnderFourMebibytesPerThread) {
  const Plan plan = choose_plan(GetParam().problem, {.engine = Engine::cpu});
  EXPECT_LT(plan.forward.scratch_bytes, std::size_t{4} << 20);
  EXPECT_LT(plan.backward.scratch_bytes, std::size_t{4} << 20);
}

TEST_P(Numbers, BothEnginesTakeEveryProblem) {
  EXPECT_EQ(supports(GetParam().problem, Engine::reference), "");
  EXPECT_EQ(supports(GetParam().problem, Engine::cpu), "");
  EXPECT_EQ(supports(GetParam().problem, Engine::automatic), "");
  EXPECT_FALSE(choose_plan(GetParam().problem).reason.empty());
}

TEST_P(Numbers, ADescriptionIsSeveralLinesWithoutGaps) {
  for (const Engine engine : {Engine::reference, Engine::cpu}) {
    const std::string text = describe(choose_plan(GetParam().problem, {.engine = engine}));
    EXPECT_GE(std::count(text.begin(), text.end(), '\n'), 3) << text;
    EXPECT_NE(text.find(engine_name(engine)), std::string::npos) << text;
    EXPECT_EQ(text.find("nan"), std::string::npos) << text;
    EXPECT_EQ(text.find("inf"), std::string::npos) << text;
  }
}

TEST(Plan, BytesCountEachTensorOnce) {
  Problem p = small_neighborhood();
  p.head_dim_v = 6;
  p.additional_tokens = 3;
  p.dtype = DType::bfloat16;
  const double queries = 2 * 6 * 7;
  const double q = queries * 4 * 8, k = queries * 2 * 8, v = queries * 2 * 6, o = queries * 4 * 6;
  const double extra_k = 2 * 3 * 2 * 8, extra_v = 2 * 3 * 2 * 6;
  const double lse = queries * 4 * 4;  // float32
  const Plan plan = choose_plan(p);
  EXPECT_EQ(plan.forward_bytes, 2 * (q + k + v + o + extra_k + extra_v) + lse);
  EXPECT_EQ(plan.backward_bytes, 2 * (2 * (q + k + v + o) + 2 * (extra_k + extra_v)) + lse);
}

TEST(Plan, AutomaticTakesTheFastEngineAndSaysWhy) {
  const Plan plan = choose_plan(small_neighborhood());
  EXPECT_EQ(plan.engine, Engine::cpu);
  EXPECT_FALSE(plan.reason.empty());
}

TEST(Plan, IsTheSameEveryTime) {
  EXPECT_EQ(describe(choose_plan(small_neighborhood())), describe(choose_plan(small_neighborhood())));
}

TEST(Plan, TakesThreadsAsGivenAndOtherwiseAsManyAsAreWorthIt) {
  EXPECT_EQ(choose_plan(small_neighborhood(), {.threads = 3}).threads, 3);
  EXPECT_EQ(choose_plan(small_neighborhood()).threads, 1) << "waking another costs more than the whole problem";
  Problem large = small_neighborhood();
  large.layout = {256, 256};
  large.head_dim = 64;
  EXPECT_EQ(choose_plan(large).threads, default_threads());
}

TEST(Plan, TakesTilesAsGiven) {
  Problem p = small_neighborhood();
  p.layout = {28, 28};
  const Plan plan = choose_plan(p, {.engine = Engine::cpu, .tile_q = {1, 2, 8}, .rows = 32});
  EXPECT_EQ(plan.forward.tile.rows, 32);
  EXPECT_EQ(plan.forward.tile.extent, (std::array{1, 2, 8}));
}

TEST(Plan, RefusesOptionsThatCannotBe) {
  const Problem p = small_neighborhood();
  expect_invalid([&] { (void)choose_plan(p, {.threads = -1}); }, "threads", "-1", "0");
  expect_invalid([&] { (void)choose_plan(p, {.engine = Engine::cpu, .rows = 24}); }, "rows", "24", "16, 32");
  const auto plan_with_tile = [&](std::array<int, 3> tile) {
    return [&p, tile] { (void)choose_plan(p, {.engine = Engine::cpu, .tile_q = tile}); };
  };
  expect_invalid(plan_with_tile({1, -1, 2}), "tile_q[1]", "-1", "0 to ");
  expect_invalid(plan_with_tile({1, 2, 1000}), "tile_q[2]", "1000", "0 to ");
  expect_invalid(plan_with_tile({2, 2, 2}), "tile_q[0]", "2", "no such axis");
  expect_invalid(plan_with_tile({1, 32, 32}), "tile_q", "1024 positions", "at most rows, 64");
}

TEST(Plan, BackwardOptionsBoundTheKeySplits) {
  Problem p = small_neighborhood();
  p.batch = 2;
  p.heads = 8;
  p.heads_kv = 8;
  const auto allowed = [&p](const BackwardOptions& options) {
    const Plan plan = choose_plan(p, {.engine = Engine::cpu, .backward = options});
    EXPECT_EQ(plan.backward.options, options);
    EXPECT_EQ(plan.backward.kv_splits, 1);  // the engine is bit-exact whatever it may do
    return plan.backward.kv_splits_allowed;
  };
  EXPECT_EQ(allowed({}), 4096 / 32);  // batch 2, 8 heads, 2 residue classes
  EXPECT_EQ(allowed({.memory = MemoryPreference::strict}), 1024 / 32);
  EXPECT_EQ(allowed({.memory = MemoryPreference::unrestricted}), 65535);
  EXPECT_EQ(allowed({.kv_splits = {1, 3, 5}}), 15);
  EXPECT_EQ(allowed({.deterministic = true}), 1);
  EXPECT_EQ(allowed({.kv_parallelism = false, .memory = MemoryPreference::unrestricted}), 1);
  EXPECT_EQ(allowed({.deterministic = true, .kv_splits = {1, 3, 5}}), 1);
  p.batch = 1 << 12;  // batch and heads are parallelism enough
  EXPECT_EQ(allowed({}), 1);
  EXPECT_EQ(allowed({.memory = MemoryPreference::unrestricted}), 65535);
  expect_invalid([&] { (void)allowed({.kv_splits = {1, -1, 1}}); }, "kv_splits[1]", "-1", "0 to 65535");
}

TEST(Plan, ChecksTheProblemFirst) {
  Problem p = small_neighborhood();
  neighborhood(p).kernel_size = {3, 0};
  expect_invalid([&] { (void)choose_plan(p); }, "kernel_size[1]", "0", "1 to ");
}

TEST(Plan, DescriptionNamesTilesAndRatio) {
  Problem p = small_neighborhood();
  p.layout = {56, 56};
  p.mask = Neighborhood{.kernel_size = 13};
  const Plan plan = choose_plan(p);
  const std::string text = describe(plan);
  EXPECT_NE(text.find("ratio"), std::string::npos) << text;
  EXPECT_NE(text.find("56"), std::string::npos) << text;
  EXPECT_NE(text.find("13"), std::string::npos) << text;
  EXPECT_NE(text.find(std::to_string(plan.forward.tile.rows)), std::string::npos) << text;
  EXPECT_NE(text.find(plan.reason), std::string::npos) << text;
}

TEST(Work, RatioOfNoWorkIsOne) {
  EXPECT_EQ(Work{}.ratio(), 1.0);
  EXPECT_EQ((Work{.mask_pairs = 2, .tile_pairs = 3}.ratio()), 1.5);
}

}  // namespace
}  // namespace vicus
