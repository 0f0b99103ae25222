// Legal problems at the edges of numbers, sizes and counts, each judged by the reference engine or by the definition.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "testing.h"

namespace vicus {
namespace {

using testing::expect_invalid;
using testing::Tensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Results {
  std::vector<float> output, logsumexp, query, key, value;
};

/// Forward and backward of one engine; grad_output is all ones.
Results run(const Problem& problem, Engine engine, Tensor<float>& q, Tensor<float>& k, Tensor<float>& v,
            const ConstTensorView& attn_bias = {}) {
  const Plan plan = choose_plan(problem, {.engine = engine, .threads = 2});
  const Problem& p = plan.problem;
  Tensor<float> out(p.output_shape(), 0.F), lse(p.logsumexp_shape(), 0.F), ones(p.output_shape(), 1.F);
  Tensor<float> dq(p.query_shape(), 0.F), dk(p.key_shape(), 0.F), dv(p.value_shape(), 0.F);
  AttentionInputs in{.query = q.view(), .key = k.view(), .value = v.view()};
  in.attn_bias = attn_bias;
  forward(plan, in, out.view(), lse.view());
  backward(plan, in, {.output = out.view(), .logsumexp = lse.view(), .grad_output = ones.view()},
           {.query = dq.view(), .key = dk.view(), .value = dv.view()});
  return {out.data, lse.data, dq.data, dk.data, dv.data};
}

void expect_near(const std::vector<float>& got, const std::vector<float>& want, float tolerance) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(want[i])) {
      EXPECT_TRUE(std::isnan(got[i])) << i;
    } else {
      EXPECT_LE(std::abs(got[i] - want[i]), tolerance * std::max(1.F, std::abs(want[i]))) << i;
    }
  }
}

Problem dense(std::int64_t tokens, std::int64_t heads, std::int64_t heads_kv, std::int64_t dim) {
  Problem p;
  p.layout = tokens;
  p.heads = heads;
  p.heads_kv = heads_kv;
  p.head_dim = dim;
  p.mask = Dense{.keys = tokens};
  return validate(p);
}

TEST(Edges, TheMostNegativeBiasHidesNothing) {
  // What models add for 'masked' when they avoid -inf: a row of it is a uniform average, not an empty row.
  Problem p = dense(9, 1, 1, 4);
  p.attn_bias = true;
  Tensor<float> q(p.query_shape(), 1U), k(p.key_shape(), 2U), v(p.value_shape(), 3U);
  Tensor<float> bias({1, 1, 9, 9}, std::numeric_limits<float>::lowest());
  expect_near(run(p, Engine::cpu, q, k, v, bias.view()).output, run(p, Engine::reference, q, k, v, bias.view()).output,
              1e-5F);
  Tensor<double> wide({1, 1, 9, 9}, -1e300);  // beyond float32, and still not -inf
  expect_near(run(p, Engine::cpu, q, k, v, wide.view()).output, run(p, Engine::reference, q, k, v, wide.view()).output,
              1e-5F);
}

TEST(Edges, WeightsStayAtMostOneWhereRoundingIsCoarse) {
  Problem p = dense(40, 1, 1, 8);
  Tensor<float> q(p.query_shape(), 3e4F), k(p.key_shape(), 3e4F), v(p.value_shape(), 3U);
  const Results got = run(p, Engine::cpu, q, k, v);
  // Equal keys share each query's weight; the float32 logsumexp here is coarse to a few hundred, so only bounds hold.
  for (const float x : got.value) EXPECT_TRUE(x >= 0 && x <= 40.F) << x;
  expect_near(got.output, run(p, Engine::reference, q, k, v).output, 1e-4F);
}

TEST(Edges, NanInTheWindowReachesOutputLogsumexpAndGradients) {
  Problem p = dense(20, 1, 1, 8);
  Tensor<float> q(p.query_shape(), 1U), k(p.key_shape(), 2U), v(p.value_shape(), 3U);
  k.data[5] = std::nanf("");
  const Results got = run(p, Engine::cpu, q, k, v);
  for (const auto* list : {&got.output, &got.logsumexp, &got.query, &got.key, &got.value}) {
    for (const float x : *list) EXPECT_TRUE(std::isnan(x));
  }
}

TEST(Edges, GroupsOfVeryManyHeadsKeepTheirScratchSmall) {
  for (const std::int64_t heads : {128, 1024}) {
    const Plan plan = choose_plan(dense(64, heads, 1, 192), {.threads = 2});
    EXPECT_LT(plan.backward.scratch_bytes, std::size_t{5} << 20) << heads;
    EXPECT_LT(plan.forward.scratch_bytes, std::size_t{4} << 20) << heads;
  }
  Problem p = dense(33, 700, 1, 128);
  ASSERT_GT(choose_plan(p, {.threads = 2}).backward.border_blocks, 0) << "the group is cut";
  Tensor<float> q(p.query_shape(), 1U), k(p.key_shape(), 2U), v(p.value_shape(), 3U);
  const Results got = run(p, Engine::cpu, q, k, v);
  const Results want = run(p, Engine::reference, q, k, v);
  expect_near(got.query, want.query, 1e-4F);
  expect_near(got.key, want.key, 1e-3F);
  expect_near(got.value, want.value, 1e-3F);
}

TEST(Edges, ShortSequencesBesideALongOneMakeFewTasks) {
  Problem p;
  Dense mask;
  mask.cumulative_queries = {0};
  for (int i = 1; i <= 10000; ++i) mask.cumulative_queries.push_back(i);
  mask.cumulative_queries.push_back(10000 + 65536);
  mask.cumulative_keys = mask.cumulative_queries;
  mask.keys = mask.cumulative_keys.back();
  mask.window_left = mask.window_right = 8;
  p.layout = mask.keys;
  p.head_dim = 8;
  p.mask = mask;
  const Plan plan = choose_plan(p, {.threads = 1});
  EXPECT_LT(plan.forward.tasks, 10000 + 65536 / 16 + 1);
  EXPECT_GE(plan.forward.tasks, 10001);
}

TEST(Edges, NumbersThatNoTypeHoldsAreRefused) {
  Problem p = testing::small_dense();
  p.scale = 1e39;
  expect_invalid([&] { (void)validate(p); }, "scale", "9", "finite");
  p.dtype = DType::float64;
  EXPECT_NO_THROW((void)validate(p));
  expect_invalid([&] { (void)choose_plan(p, {.threads = 5000}); }, "threads", "5000", "1024");
  expect_invalid([&] { (void)score_slots(p); }, "problem", "dense", "neighborhood");
  expect_invalid([&] { (void)p.rpb_shape(); }, "rpb", "asked for", "neighborhood");

  Tensor<float> query({1, 1, 2, 2, 2, 4}, 1U), key({1, 1, 2, 2, 2, 4}, 2U), scores({1, 1, 2, 2, 2, 0}, 0.F);
  Neighborhood mask{.kernel_size = {1 << 22, 1 << 21, 1 << 21}};  // the product of the three is 2^64
  expect_invalid([&] { qk_forward(mask, query.view(), key.view(), scores.view()); }, "kernel_size",
                 "(4194304, 2097152, 2097152)", "2^63");
}

TEST(Edges, OutputsInTheMemoryOfOthersAreRefused) {
  const Problem p = dense(6, 1, 1, 4);
  const Plan plan = choose_plan(p);
  Tensor<float> q(p.query_shape(), 1U), k(p.key_shape(), 2U), v(p.value_shape(), 3U), out(p.output_shape(), 9.F);
  const AttentionInputs in{.query = q.view(), .key = k.view(), .value = v.view()};
  expect_invalid([&] { forward(plan, in, k.view()); }, "output", "in the memory of key", "its own");
  expect_invalid([&] { forward(plan, in, out.view(), TensorView(out.data.data(), {1, 6, 1})); }, "logsumexp",
                 "in the memory of output", "its own");
  EXPECT_TRUE(std::all_of(out.data.begin(), out.data.end(), [](float x) { return x == 9.F; }));
}

TEST(Edges, MergingKeepsNanWhereverItStands) {
  Tensor<float> one({1, 1, 1, 2}, 1.F), two({1, 1, 1, 2}, 2.F), out({1, 1, 1, 2}, 0.F);
  for (const auto& [first, second] : {std::pair{std::nanf(""), -kInfinity}, std::pair{-kInfinity, std::nanf("")}}) {
    Tensor<float> lse_one({1, 1, 1}, first), lse_two({1, 1, 1}, second), lse({1, 1, 1}, 0.F);
    merge_forward(std::vector<ConstTensorView>{one.view(), two.view()},
                  std::vector<ConstTensorView>{lse_one.view(), lse_two.view()}, out.view(), lse.view());
    EXPECT_TRUE(std::isnan(lse.data[0]));
    EXPECT_TRUE(std::isnan(out.data[0]) && std::isnan(out.data[1]));
  }
}

TEST(Edges, ASinkMayUseTheLibrary) {
  int heard = 0;
  set_log_sink(
      [&](LogLevel, std::string_view) {
        ++heard;
        set_log_sink({});
        (void)choose_plan(testing::small_dense());
      },
      LogLevel::debug);
  (void)choose_plan(testing::small_dense());
  set_log_sink({});
  EXPECT_EQ(heard, 1);
}

}  // namespace
}  // namespace vicus
