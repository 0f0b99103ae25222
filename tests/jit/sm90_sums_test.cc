// Engine sm90 without a GPU: which kernels sum which gradients.
#include <gtest/gtest.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "device_tensor.h"
#include "fake_cuda.h"
#include "gpu/sm90_args.h"
#include "hopper_problems.h"
#include "launched.h"
#include "vicus/vicus.hpp"

namespace vicus {
namespace {

using vicus::testing::dense_problem;
using vicus::testing::fake_cuda;
using vicus::testing::kH100;
using vicus::testing::problem_of;
using vicus::testing::Tensor;
using vicus::testing::told;

TEST(BoxSums, WhereTheKernelOfKeysSumsTheGradientOfTheQuery) {
  const auto adds = [](const Problem& p, const BackwardOptions& options = {}) {
    const GpuGradientPlan g = choose_plan(p, {.engine = Engine::sm90, .backward = options, .gpu = kH100}).gpu.backward;
    EXPECT_EQ(g.keys.family, GpuKernels::warpgroups);
    return g.add_queries;
  };
  EXPECT_TRUE(adds(dense_problem(1000, 700)));
  EXPECT_TRUE(adds(dense_problem(1000, 700, {.key_lengths = {100, 300}})));
  EXPECT_FALSE(adds(dense_problem(1000, 700), {.kv_parallelism = false}));
  EXPECT_FALSE(adds(dense_problem(1000, 700), {.kv_splits = {1, 1, 1}}));
  Problem many = dense_problem(1000, 700);
  many.heads = many.heads_kv = 2048;
  EXPECT_FALSE(adds(many)) << "as many tasks as may be, without parts of the keys";
  EXPECT_TRUE(adds(many, {.memory = MemoryPreference::unrestricted}));
  Problem more = dense_problem(1000, 700);
  more.additional_tokens = 3;
  EXPECT_FALSE(adds(more));
  EXPECT_FALSE(adds(problem_of({100, 100}, {.kernel_size = 30, .dilation = {1, 2}}, 128)));
  const Neighborhood deep = {.kernel_size = {6, 16, 16}};
  EXPECT_TRUE(adds(problem_of({8, 64, 64}, deep, 64)));
  EXPECT_TRUE(adds(problem_of({8, 64, 64}, deep, 128)));
}

TEST(BoxSums, WhatIsFasterWhereNoEngineIsAskedFor) {
  const auto kernels = [](Problem p, std::int64_t batch, std::int64_t heads) {
    p.batch = batch;
    p.heads = p.heads_kv = heads;
    const GpuGradientPlan g = choose_plan(p, {.gpu = kH100}).gpu.backward;
    const bool mixed = !g.add_queries && g.keys.family != g.queries.family;
    return std::string(mixed                                     ? "sm80 and sm90"
                       : g.keys.family == GpuKernels::warpgroups ? "sm90"
                                                                 : "sm80") +
           (g.add_queries            ? ", one"
            : g.values.tile.rows > 0 ? ", three"
                                     : ", two");
  };
  // As measured: notes/sm90_backward.md.
  EXPECT_EQ(kernels(problem_of({56, 56}, {.kernel_size = 3}), 16, 4), "sm80, two");
  EXPECT_EQ(kernels(problem_of({56, 56}, {.kernel_size = 7}), 16, 4), "sm80 and sm90, two");
  EXPECT_EQ(kernels(problem_of({56, 56}, {.kernel_size = 13}), 16, 4), "sm90, two");
  EXPECT_EQ(kernels(problem_of({64, 64}, {.kernel_size = 16}), 8, 12), "sm90, two");
  EXPECT_EQ(kernels(problem_of({8, 32, 32}, {.kernel_size = {4, 8, 8}}), 8, 8), "sm90, two");
  EXPECT_EQ(kernels(problem_of({30, 48, 80}, {.kernel_size = {18, 24, 24}}, 128), 1, 24), "sm90, one");
  EXPECT_EQ(kernels(problem_of({16, 32, 32}, {.kernel_size = {8, 12, 12}}, 128), 2, 16), "sm90, one");
  EXPECT_EQ(kernels(problem_of({256, 256}, {.kernel_size = 80}, 128), 1, 24), "sm90, one");
  EXPECT_EQ(kernels(problem_of({56, 56}, {.kernel_size = 7}, 256), 8, 4), "sm90, three");
  EXPECT_EQ(kernels(problem_of({4096}, {.kernel_size = 64}, 256), 2, 8), "sm90, three");
  EXPECT_EQ(kernels(dense_problem(4096, 4096), 4, 16), "sm90, one");
  EXPECT_EQ(kernels(dense_problem(4096, 4096, {.causal = Causal::top_left}), 4, 16), "sm90, one");
}

TEST(BoxSums, SumsOfTheGradientOfTheQueryLieByHeads) {
  auto& fake = fake_cuda();
  {
    const std::lock_guard lock(fake.mutex);
    fake.events.clear();
  }
  const Plan plan = choose_plan(problem_of({80, 90}, {.kernel_size = 31}, 72), {.engine = Engine::sm90, .gpu = kH100});
  const Problem& p = plan.problem;
  ASSERT_TRUE(plan.gpu.backward.add_queries);
  const Tensor query(p.dtype, p.query_shape()), key(p.dtype, p.key_shape()), value(p.dtype, p.value_shape());
  const Tensor output(p.dtype, p.output_shape()), logsumexp(DType::float32, p.logsumexp_shape());
  const Tensor dq(p.dtype, p.query_shape()), dk(p.dtype, p.key_shape());
  int stream = 0;
  const auto told_keys = told<gpu::Sm90BackwardArgs>("sm90_backward", [&] {
    backward(plan, {.query = query.view, .key = key.view, .value = value.view},
             {.output = output.view, .logsumexp = logsumexp.view, .grad_output = output.view},
             {.query = dq.view, .key = dk.view}, &stream);
  });
  const std::lock_guard lock(fake.mutex);
  const std::string bytes = std::to_string(p.batch * p.heads * 80 * 90 * 80 * 4);
  const auto cleared = std::find(fake.events.begin(), fake.events.end(), "clear " + bytes);
  ASSERT_NE(cleared, fake.events.end());
  EXPECT_EQ(std::count(cleared, fake.events.end(), "map"), 5) << "four tensors and the sums";
  ASSERT_EQ(fake.launches.size(), 3U) << "delta, of keys, convert";
  ASSERT_EQ(fake.launches[1].kernel, "sm90_backward");
  const gpu::Sm90BackwardArgs& args = told_keys.at(0);
  const gpu::Rows& sums = args.backward.query_sums;
  constexpr long long kWidth = 80;
  EXPECT_EQ(sums.token[2], kWidth);
  EXPECT_EQ(sums.token[1], 90 * kWidth);
  EXPECT_EQ(sums.head, 80 * 90 * kWidth);
  EXPECT_EQ(sums.batch, p.heads * sums.head);
  EXPECT_EQ(args.backward.statistics.data, static_cast<float*>(sums.data) + p.batch * sums.batch);
}

TEST(BoxSums, LongHeadDimsForWhichTheOtherEngineHasNoTile) {
  Problem p = problem_of({128, 128}, {.kernel_size = 40}, 208);
  const Plan plan = choose_plan(p, {.gpu = kH100});
  EXPECT_EQ(plan.gpu.backward.keys.family, GpuKernels::warpgroups);
  EXPECT_EQ(plan.gpu.backward_unboxed.keys.family, GpuKernels::plain);
  EXPECT_EQ(plan.gpu.reason, "");
  p.additional_tokens = 3;
  const Plan more = choose_plan(p, {.gpu = kH100});
  EXPECT_EQ(more.gpu.backward.keys.family, GpuKernels::plain) << "gradients of additional tokens are of that engine";
  EXPECT_NE(more.gpu.reason, "");
}

TEST(BoxSums, EachKernelOfLongHeadDimsStoresWhatItSums) {
  const Plan plan = choose_plan(problem_of({80, 90}, {.kernel_size = 31}, 256), {.engine = Engine::sm90, .gpu = kH100});
  const Problem& p = plan.problem;
  const Tensor query(p.dtype, p.query_shape()), key(p.dtype, p.key_shape()), value(p.dtype, p.value_shape());
  const Tensor output(p.dtype, p.output_shape()), logsumexp(DType::float32, p.logsumexp_shape());
  const Tensor dq(p.dtype, p.query_shape()), dk(p.dtype, p.key_shape()), dv(p.dtype, p.value_shape());
  int stream = 0;
  // dK and dV, present or not, of the launches with boxes.
  const auto stored = [&](const AttentionGradients& out) {
    std::vector<std::pair<bool, bool>> list;
    for (const auto& args : told<gpu::Sm90BackwardArgs>("sm90_backward", [&] {
           backward(plan, {.query = query.view, .key = key.view, .value = value.view},
                    {.output = output.view, .logsumexp = logsumexp.view, .grad_output = output.view}, out, &stream);
         })) {
      list.emplace_back(args.backward.grad_key.data != nullptr, args.backward.grad_value.data != nullptr);
    }
    return list;
  };
  using Stored = std::vector<std::pair<bool, bool>>;
  EXPECT_EQ(stored({.query = dq.view, .key = dk.view, .value = dv.view}),
            (Stored{{true, true}, {true, false}, {false, true}}))
      << "of queries, of keys, of values";
  EXPECT_EQ(stored({.query = dq.view}), (Stored{{false, false}}));
  EXPECT_EQ(stored({.key = dk.view}), (Stored{{true, false}}));
}

}  // namespace
}  // namespace vicus
