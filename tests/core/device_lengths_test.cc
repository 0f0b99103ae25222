// Problems whose lists of lengths come with each call: rules, counts, who takes them. Calls are in tests/jit and tests/gpu.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "testing.h"

namespace vicus {
namespace {

using testing::dense;
using testing::expect_invalid;
using testing::small_dense;

constexpr GpuTarget kGpu = {9, 0, 132, 232448};

/// 1000 queries and 2000 keys in `n` sequences of at most 100 and 250.
Problem packed(std::int64_t n) {
  Problem p = small_dense();
  p.dtype = DType::bfloat16;
  p.batch = 1;
  p.layout = 1000;
  dense(p).keys = 2000;
  dense(p).device = {.sequences = n, .max_queries = 100, .max_keys = 250};
  return p;
}

Problem padded() {
  Problem p = small_dense();
  p.dtype = DType::bfloat16;
  dense(p).device.key_lengths = true;
  return p;
}

template <class Break>
void expect_broken(Problem p, const Break& breaks, const std::string& argument, const std::string& got,
                   const std::string& allowed) {
  ASSERT_NO_THROW((void)validate(p));
  breaks(p);
  expect_invalid([&] { (void)validate(p); }, argument, got, allowed);
}

TEST(DeviceLengths, KeepTheRulesOfLists) {
  const Problem p = packed(8);
  expect_broken(p, [](Problem& q) { dense(q).device.sequences = -1; }, "device.sequences", "-1", "0 to ");
  expect_broken(p, [](Problem& q) { dense(q).device.max_queries = 1001; }, "device.max_queries", "1001", "0 to 1000");
  expect_broken(p, [](Problem& q) { dense(q).device.max_keys = -3; }, "device.max_keys", "-3", "0 to 2000");
  expect_broken(p, [](Problem& q) { dense(q).device.key_lengths = true; }, "device.key_lengths", "true", "false with");
  expect_broken(p, [](Problem& q) { q.batch = 2; }, "batch", "2", "1 with packed");
  expect_broken(p, [](Problem& q) { q.attn_bias = true; }, "attn_bias", "given", "absent with packed");
  const auto both = [](Problem& q) {
    dense(q).cumulative_queries = {0, 1000};
    dense(q).cumulative_keys = {0, 2000};
  };
  expect_broken(p, both, "device", "given", "without cumulative_queries");
  expect_broken(p, [](Problem& q) { dense(q).cumulative_keys = {0, 2000}; }, "device", "given", "without");
  expect_broken(padded(), [](Problem& q) { dense(q).key_lengths = {1, 2}; }, "device", "given", "without");
  expect_broken(padded(), [](Problem& q) { dense(q).device.max_keys = 1; }, "device.max_keys", "1", "0 to 0");
  EXPECT_NO_THROW((void)validate([] {
    Problem q = padded();
    q.attn_bias = true;
    return q;
  }()));
}

TEST(DeviceLengths, AreForTheGpuOnly) {
  for (const Problem& p : {packed(8), padded()}) {
    EXPECT_EQ(supports(p, Engine::sm80), "");
    for (const Engine engine : {Engine::automatic, Engine::reference, Engine::cpu}) {
      const std::string why = supports(p, engine);
      EXPECT_NE(why.find("engine sm80"), std::string::npos) << why;
      try {
        (void)choose_plan(p, {.engine = engine});
        ADD_FAILURE() << "no error";
      } catch (const Unsupported& error) {
        EXPECT_NE(std::string(error.what()).find(why), std::string::npos);
      }
    }
  }
}

TEST(DeviceLengths, WorkIsCountedForTheLongest) {
  const auto pairs = [](Problem p, Causal causal = Causal::none) {
    dense(p).causal = causal;
    const Plan plan = choose_plan(p, {.engine = Engine::sm80, .gpu = kGpu});
    EXPECT_GE(plan.gpu.forward.work.ratio(), 1);
    EXPECT_GT(plan.gpu.forward.blocks, 0);
    return plan.mask_pairs / static_cast<double>(p.heads);
  };
  EXPECT_EQ(pairs(packed(3)), 3 * 100 * 250);
  EXPECT_EQ(pairs(packed(100)), 8 * 100 * 250) << "there are keys for eight";
  EXPECT_EQ(pairs(packed(3), Causal::top_left), 3 * 100 * 101 / 2);
  EXPECT_EQ(pairs(padded()), 2 * 10 * 12) << "as if nothing were padding";
  Problem more = packed(2);
  more.additional_tokens = 7;
  EXPECT_EQ(pairs(more), 2 * 100 * 250 + 1000 * 7);
  more = packed(2);
  dense(more).device.max_queries = dense(more).device.max_keys = 0;
  EXPECT_EQ(choose_plan(more, {.engine = Engine::sm80, .gpu = kGpu}).mask_pairs, 0);
}

TEST(DeviceLengths, ADescriptionSaysWhatIsCounted) {
  const std::string text = describe(choose_plan(packed(8), {.engine = Engine::sm80, .gpu = kGpu}));
  for (const char* const part : {"packed sequences 8 of at most 100 queries and 250 keys", "counted for the longest"}) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }
  EXPECT_NE(describe(choose_plan(padded(), {.engine = Engine::sm80, .gpu = kGpu})).find("padded keys (lengths come"),
            std::string::npos);
}

TEST(DeviceLengths, ListsOfAProblemAreTakenByTheGpuToo) {
  Problem p = packed(0);
  dense(p).device = {};
  dense(p).cumulative_queries = {0, 10, 10, 1000};
  dense(p).cumulative_keys = {0, 0, 500, 2000};
  const Plan plan = choose_plan(p, {.engine = Engine::sm80, .gpu = kGpu});
  EXPECT_EQ(plan.mask_pairs, 4.0 * 990 * 1500) << "exact: the plan knows them";
}

TEST(DeviceLengths, CallsWithoutThemTakeNoLists) {
  const Problem p = validate(small_dense());
  const Plan plan = choose_plan(p);
  testing::Tensor<float> q(p.query_shape(), 1U), k(p.key_shape(), 2U), v(p.value_shape(), 3U), o(p.output_shape(), 0.F);
  const std::vector<std::int32_t> list = {5, 6};
  const AttentionInputs in = {.query = q.view(), .key = k.view(), .value = v.view()};
  const auto call = [&](AttentionInputs inputs) { return [&, inputs] { forward(plan, inputs, o.view()); }; };
  AttentionInputs wrong = in;
  wrong.key_lengths = list;
  expect_invalid(call(wrong), "key_lengths", "2 values", "none");
  wrong = in;
  wrong.cumulative_queries = list;
  expect_invalid(call(wrong), "cumulative_queries", "2 values", "none");
  wrong = in;
  wrong.cumulative_keys = list;
  expect_invalid(call(wrong), "cumulative_keys", "2 values", "none");
  EXPECT_TRUE(std::all_of(o.data.begin(), o.data.end(), [](float x) { return x == 0; })) << "nothing was written";
}

}  // namespace
}  // namespace vicus
