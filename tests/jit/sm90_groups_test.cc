// Engine sm90 without a GPU: gradients of keys that several query heads share, which several blocks may sum.
#include <gtest/gtest.h>

#include <mutex>
#include <string>
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
using vicus::testing::FakeLaunch;
using vicus::testing::kH100;
using vicus::testing::problem_of;
using vicus::testing::Tensor;
using vicus::testing::told;

Problem grouped(Problem p, std::int64_t batch, std::int64_t heads, std::int64_t heads_kv) {
  p.batch = batch;
  p.heads = heads;
  p.heads_kv = heads_kv;
  return p;
}

Plan plan_of(const Problem& problem, const BackwardOptions& options = {}) {
  return choose_plan(problem, {.engine = Engine::sm90, .backward = options, .gpu = kH100});
}

TEST(Groups, PartsFillTheMachine) {
  const auto parts = [](const Problem& p, const BackwardOptions& options = {}) {
    return plan_of(p, options).gpu.backward.keys.key_parts;
  };
  const Dense causal = {.causal = Causal::top_left};
  // As measured: notes/sm90_backward.md.
  EXPECT_EQ(parts(grouped(dense_problem(4096, 4096, causal), 4, 16, 1)), 2) << "128 blocks, half of which are short";
  EXPECT_EQ(parts(grouped(dense_problem(4096, 4096, causal), 1, 64, 8)), 1) << "two for each multiprocessor";
  EXPECT_EQ(parts(grouped(dense_problem(2048, 2048, causal), 1, 32, 8)), 2);
  EXPECT_EQ(parts(grouped(dense_problem(8192, 8192, causal), 1, 64, 8)), 4) << "two heads of each block";
  EXPECT_EQ(parts(grouped(dense_problem(16384, 16384, causal), 1, 16, 2)), 4);
  EXPECT_EQ(parts(grouped(dense_problem(4096, 4096, causal), 4, 32, 8)), 1)
      << "parts of many short sequences are long to merge";
  EXPECT_EQ(parts(grouped(dense_problem(2048, 2048), 1, 64, 8)), 1) << "128 blocks, all alike";
  EXPECT_EQ(parts(grouped(dense_problem(4096, 4096, causal), 4, 16, 16)), 1) << "nothing to share out";
  EXPECT_EQ(parts(grouped(dense_problem(512, 512), 1, 7, 1)), 7) << "four blocks";
  EXPECT_EQ(parts(grouped(dense_problem(512, 512), 1, 7, 1), {.memory = MemoryPreference::strict}), 1);
  EXPECT_EQ(parts(grouped(problem_of({56, 56}, {.kernel_size = 13}), 16, 8, 2)), 1) << "of small windows";
  const Plan wide = plan_of(grouped(problem_of({512}, {.kernel_size = 200}, 256), 1, 8, 2));
  EXPECT_EQ(wide.gpu.backward.values.key_parts, wide.gpu.backward.keys.key_parts) << "dK and dV apart";
  EXPECT_GT(wide.gpu.backward.keys.key_parts, 1);
}

TEST(Groups, PartsTakeScratchMemory) {
  const Problem p = grouped(dense_problem(300, 500), 3, 8, 2);
  for (const bool deterministic : {false, true}) {
    const BackwardOptions options = {.deterministic = deterministic};
    BackwardOptions strict = options;
    strict.memory = MemoryPreference::strict;
    const GpuGradientPlan &some = plan_of(p, options).gpu.backward, &none = plan_of(p, strict).gpu.backward;
    ASSERT_GT(some.keys.key_parts, 1);
    const std::size_t rows = 3 * 500 * 2, of_row = (128 + 128) * sizeof(float);
    EXPECT_EQ(some.scratch_bytes - none.scratch_bytes, static_cast<std::size_t>(some.keys.key_parts) * rows * of_row);
  }
}

class GroupCalls : public ::testing::Test {
 protected:
  /// What the kernel of keys is told; `launches` has all.
  gpu::Sm90BackwardArgs run(bool with_values) {
    const Tensor query(p.dtype, p.query_shape()), key(p.dtype, p.key_shape()), value(p.dtype, p.value_shape());
    const Tensor output(p.dtype, p.output_shape()), logsumexp(DType::float32, p.logsumexp_shape());
    const Tensor dq(p.dtype, p.query_shape()), dk(p.dtype, p.key_shape()), dv(p.dtype, p.value_shape());
    int stream = 0;
    AttentionGradients out = {.query = dq.view, .key = dk.view};
    if (with_values) out.value = dv.view;
    const auto args = told<gpu::Sm90BackwardArgs>("sm90_backward", [&] {
      backward(plan, {.query = query.view, .key = key.view, .value = value.view},
               {.output = output.view, .logsumexp = logsumexp.view, .grad_output = output.view}, out, &stream);
    });
    const std::lock_guard lock(fake_cuda().mutex);
    launches = fake_cuda().launches;
    return args.at(0);
  }

  Problem p = grouped(dense_problem(300, 500), 3, 8, 2);
  Plan plan = plan_of(p);
  int parts = plan.gpu.backward.keys.key_parts;
  std::vector<FakeLaunch> launches;
};

TEST_F(GroupCalls, EachBlockHasSomeOfTheHeads) {
  const gpu::Sm90BackwardArgs args = run(true);
  std::vector<std::string> kernels;
  for (const FakeLaunch& launch : launches) kernels.push_back(launch.kernel);
  EXPECT_EQ(kernels, (std::vector<std::string>{"delta", "sm90_backward", "convert_keys", "convert"}));
  const auto count = static_cast<unsigned>(parts);
  const unsigned tiles = (500 + 127) / 128;
  EXPECT_EQ(launches.at(1).grid[0], tiles * 3 * 2 * count);
  EXPECT_EQ(args.backward.order.head_blocks.value, 2 * count);
  EXPECT_EQ(args.backward.order.group_blocks.value, count);
  EXPECT_EQ(args.backward.order.group, 4 / parts);
  EXPECT_EQ(args.backward.key_parts, parts);
  EXPECT_EQ(args.backward.key_rows, 3 * 500 * 2);
  EXPECT_EQ(launches.at(2).grid[0], 3 * 500 * 2 / 8);
}

TEST_F(GroupCalls, PartsFollowEachOther) {
  const gpu::BackwardArgs args = run(true).backward;
  const auto* const sums = static_cast<const float*>(args.query_sums.data);
  const auto* const keys = static_cast<const float*>(args.key_sums.data);
  const auto* const values = static_cast<const float*>(args.value_sums.data);
  EXPECT_EQ(keys - sums, 3 * 300 * 8 * 128);
  EXPECT_EQ(values - keys, parts * args.key_rows * 128);
  EXPECT_EQ(static_cast<const float*>(args.statistics.data) - values, parts * args.key_rows * 128);
  EXPECT_EQ(args.key_sums.head, 128);
  EXPECT_EQ(args.key_sums.token[2], 2 * 128);
  EXPECT_EQ(args.key_sums.batch, 500 * 2 * 128);
}

TEST_F(GroupCalls, GradientsThatNobodyWantsAreNotSummed) {
  const gpu::BackwardArgs args = run(false).backward;
  EXPECT_NE(args.key_sums.data, nullptr);
  EXPECT_EQ(args.value_sums.data, nullptr);
}

}  // namespace
}  // namespace vicus
