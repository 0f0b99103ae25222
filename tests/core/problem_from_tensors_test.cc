// Problems read off the tensors at hand, and the one-call operators that do so.
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "testing.h"

namespace vicus {
namespace {

using testing::expect_invalid;
using testing::Tensor;

/// A view of a shape without memory: making a problem reads no data.
ConstTensorView of(std::initializer_list<std::int64_t> shape, DType dtype = DType::float32) {
  static const float memory = 0;
  return {&memory, dtype, shape};
}

const Neighborhood kWindow{.kernel_size = {3, 5}, .stride = {1, 2}, .dilation = {2, 1}, .is_causal = {0, 1}};

TEST(NeighborhoodProblem, ReadsEverythingOffTheTensors) {
  const Problem p = neighborhood_problem(of({2, 6, 7, 4, 8}, DType::bfloat16), of({2, 6, 7, 2, 8}, DType::bfloat16),
                                         of({2, 6, 7, 2, 5}, DType::bfloat16), kWindow, 0.25,
                                         of({2, 3, 2, 8}, DType::bfloat16), of({4, 5, 9}));
  EXPECT_EQ(p.dtype, DType::bfloat16);
  EXPECT_EQ(p.batch, 2);
  EXPECT_EQ(p.layout, (AxisValues{6, 7}));
  EXPECT_EQ(p.heads, 4);
  EXPECT_EQ(p.heads_kv, 2);
  EXPECT_EQ(p.head_dim, 8);
  EXPECT_EQ(p.head_dim_v, 5);
  EXPECT_EQ(p.scale, 0.25);
  EXPECT_EQ(p.additional_tokens, 3);
  EXPECT_TRUE(p.rpb);
  EXPECT_FALSE(p.attn_bias);
  EXPECT_EQ(std::get<Neighborhood>(p.mask), kWindow);
}

TEST(NeighborhoodProblem, AbsentTensorsMeanNone) {
  const Problem p = neighborhood_problem(of({1, 9, 2, 4}), of({1, 9, 2, 4}), of({1, 9, 2, 4}), {.kernel_size = 3});
  EXPECT_EQ(p.layout, AxisValues({9}));
  EXPECT_EQ(p.additional_tokens, 0);
  EXPECT_FALSE(p.rpb);
  EXPECT_FALSE(p.scale.has_value());
}

TEST(NeighborhoodProblem, OneToThreeAxes) {
  EXPECT_EQ(neighborhood_problem(of({1, 5, 2, 4}), of({1, 5, 2, 4}), of({1, 5, 2, 4}), {.kernel_size = 3}).rank(), 1);
  EXPECT_EQ(
      neighborhood_problem(of({1, 5, 6, 2, 4}), of({1, 5, 6, 2, 4}), of({1, 5, 6, 2, 4}), {.kernel_size = 3}).rank(),
      2);
  EXPECT_EQ(
      neighborhood_problem(of({1, 5, 6, 7, 2, 4}), of({1, 5, 6, 7, 2, 4}), of({1, 5, 6, 7, 2, 4}), {.kernel_size = 3})
          .rank(),
      3);
}

TEST(NeighborhoodProblem, NamesWhatIsWrong) {
  const auto q = of({1, 6, 7, 4, 8});
  expect_invalid([&] { (void)neighborhood_problem({}, q, q, kWindow); }, "query", "absent", "a tensor");
  expect_invalid([&] { (void)neighborhood_problem(q, {}, q, kWindow); }, "key", "absent", "a tensor");
  expect_invalid([&] { (void)neighborhood_problem(q, q, {}, kWindow); }, "value", "absent", "a tensor");
  expect_invalid([&] { (void)neighborhood_problem(of({6, 4, 8}), q, q, kWindow); }, "query.shape", "[6, 4, 8]",
                 "1 to 3 token axes");
  expect_invalid([&] { (void)neighborhood_problem(q, of({1, 42, 4, 8}), q, kWindow); }, "key.shape", "[1, 42, 4, 8]",
                 "as many dimensions as query: 5");
  expect_invalid([&] { (void)neighborhood_problem(q, q, of({1, 42, 4, 8}), kWindow); }, "value.shape", "[1, 42, 4, 8]",
                 "as many dimensions as query: 5");
  expect_invalid([&] { (void)neighborhood_problem(q, of({1, 6, 7, 3, 8}), of({1, 6, 7, 3, 8}), kWindow); }, "heads_kv",
                 "3", "a divisor of heads, 4");
  expect_invalid([&] { (void)neighborhood_problem(q, of({1, 6, 7, 0, 8}), of({1, 6, 7, 0, 8}), kWindow); },
                 "key.shape[3]", "0", "1 to ");
  expect_invalid([&] { (void)neighborhood_problem(q, q, of({1, 6, 7, 4, 0}), kWindow); }, "value.shape[4]", "0",
                 "1 to ");
  expect_invalid([&] { (void)neighborhood_problem(q, q, q, kWindow, {}, of({1, 3, 8})); }, "additional_keys.shape",
                 "[1, 3, 8]", "[batch, tokens, heads_kv, head_dim]");
  expect_invalid([&] { (void)neighborhood_problem(q, q, q, {.kernel_size = 0}); }, "kernel_size[0]", "0", "1 to ");
}

TEST(DenseProblem, TakesKeysFromTheTensor) {
  Dense mask;
  mask.keys = 999;  // overwritten
  mask.causal = Causal::bottom_right;
  mask.window_left = 4;
  const Problem p = dense_problem(of({2, 10, 4, 8}), of({2, 12, 1, 8}), of({2, 12, 1, 3}), mask, {}, of({2, 5, 1, 8}),
                                  of({1, 4, 10, 12}));
  EXPECT_EQ(p.layout, AxisValues({10}));
  EXPECT_EQ(p.keys(), 12);
  EXPECT_EQ(p.heads_kv, 1);
  EXPECT_EQ(p.head_dim_v, 3);
  EXPECT_EQ(p.additional_tokens, 5);
  EXPECT_TRUE(p.attn_bias);
  EXPECT_FALSE(p.rpb);
  EXPECT_EQ(std::get<Dense>(p.mask).causal, Causal::bottom_right);
  EXPECT_EQ(std::get<Dense>(p.mask).window_left, 4);
}

TEST(DenseProblem, NamesWhatIsWrong) {
  const auto q = of({1, 10, 4, 8});
  const auto grid = of({1, 2, 5, 4, 8});
  expect_invalid([&] { (void)dense_problem(grid, grid, grid, {}); }, "query.shape", "[1, 2, 5, 4, 8]",
                 "[batch, tokens, heads, head_dim]");
  Dense mask;
  mask.key_lengths = {11};
  expect_invalid([&] { (void)dense_problem(q, q, q, mask); }, "key_lengths[0]", "11", "0 to 10");
}

TEST(OneCall, NeighborhoodAttentionIsPlanAndForward) {
  const std::vector<std::int64_t> shape = {1, 6, 7, 2, 8};
  Tensor<float> q(shape, 1U), k(shape, 2U), v(shape, 3U), once(shape, 0.F), planned(shape, 0.F);
  Tensor<float> lse_once({1, 6, 7, 2}, 0.F), lse_planned({1, 6, 7, 2}, 0.F);
  neighborhood_attention(q.view(), k.view(), v.view(), once.view(), kWindow, 0.5, lse_once.view());
  const Plan plan = choose_plan(neighborhood_problem(q.view(), k.view(), v.view(), kWindow, 0.5));
  forward(plan, {.query = q.view(), .key = k.view(), .value = v.view()}, planned.view(), lse_planned.view());
  EXPECT_EQ(once.data, planned.data);
  EXPECT_EQ(lse_once.data, lse_planned.data);
  EXPECT_NE(once.data, Tensor<float>(shape, 0.F).data);
}

TEST(OneCall, AttentionOfEqualKeysIsTheMeanOfTheValues) {
  // Equal keys give equal weights, so that every output is the mean over the keys in sight: causal, 0..i.
  Tensor<double> q({1, 4, 1, 2}, 7U), k({1, 4, 1, 2}, 0.5), v({1, 4, 1, 1}, 0.), out({1, 4, 1, 1}, -1.);
  Tensor<double> lse({1, 4, 1}, 0.);
  v.data = {1, 2, 3, 10};
  Dense mask;
  mask.causal = Causal::top_left;
  attention(q.view(), k.view(), v.view(), out.view(), mask, 0.0, lse.view());
  const double want[] = {1, 1.5, 2, 4};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(out.data[i], want[i], 1e-14);
    EXPECT_NEAR(lse.data[i], std::log(static_cast<double>(i + 1)), 1e-14);
  }
}

TEST(OneCall, EmptyProblemsWriteNothing) {
  const ConstTensorView none(nullptr, DType::float32, {0, 5, 2, 4});
  const TensorView out(nullptr, DType::float32, {0, 5, 2, 4});
  EXPECT_NO_THROW(neighborhood_attention(none, none, none, out, {.kernel_size = 3}));
  EXPECT_NO_THROW(attention(none, none, none, out));
}

TEST(OneCall, WithoutKeysOutputIsZeroAndLogsumexpMinusInfinity) {
  Tensor<float> q({1, 3, 2, 4}, 1U), out({1, 3, 2, 5}, 9.F), lse({1, 3, 2}, 9.F);
  const ConstTensorView no_key(nullptr, DType::float32, {1, 0, 2, 4}), no_value(nullptr, DType::float32, {1, 0, 2, 5});
  attention(q.view(), no_key, no_value, out.view(), {}, {}, lse.view());
  for (const float x : out.data) EXPECT_EQ(x, 0.F);
  for (const float x : lse.data) EXPECT_EQ(x, -std::numeric_limits<float>::infinity());
}

}  // namespace
}  // namespace vicus
