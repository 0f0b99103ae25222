// Which kernels of a call may begin while the one before still runs, without a GPU.
#include <gtest/gtest.h>

#include <mutex>
#include <string>
#include <vector>

#include "device_tensor.h"
#include "fake_cuda.h"
#include "gpu/merge_args.h"
#include "gpu/sm90_args.h"
#include "hopper_problems.h"
#include "launched.h"
#include "vicus/vicus.hpp"

namespace vicus {
namespace {

using vicus::testing::args_of;
using vicus::testing::dense_problem;
using vicus::testing::fake_cuda;
using vicus::testing::FakeLaunch;
using vicus::testing::kH100;
using vicus::testing::problem_of;
using vicus::testing::Tensor;

constexpr int kHopper = 1;  // the device that is one

/// "kernel" of each launch; "> kernel" where it may begin early, "kernel >" where the next may and it lets it.
std::vector<std::string> launches_of(const Plan& plan, bool forward_pass, bool query_only = false) {
  const Problem& p = plan.problem;
  const auto made = [&](const std::vector<std::int64_t>& shape, DType dtype) {
    return Tensor(dtype, shape, 0, kHopper);
  };
  const Tensor query = made(p.query_shape(), p.dtype), key = made(p.key_shape(), p.dtype);
  const Tensor value = made(p.value_shape(), p.dtype), output = made(p.output_shape(), p.dtype);
  const Tensor logsumexp = made(p.logsumexp_shape(), DType::float32);
  const Tensor dq = made(p.query_shape(), p.dtype), dk = made(p.key_shape(), p.dtype),
               dv = made(p.value_shape(), p.dtype);
  auto& fake = fake_cuda();
  {
    const std::lock_guard lock(fake.mutex);
    for (const char* const name : {"delta", "convert", "convert_keys", "backward_queries", "backward_keys"}) {
      fake.arg_bytes[name] = sizeof(gpu::BackwardArgs);
    }
    fake.arg_bytes["sm90_backward"] = sizeof(gpu::Sm90BackwardArgs);
    fake.arg_bytes["sm90_forward"] = sizeof(gpu::Sm90Args);
    fake.arg_bytes["merge_parts"] = sizeof(gpu::MergeArgs);
    fake.launches.clear();
  }
  int stream = 0;
  const AttentionInputs in = {.query = query.view, .key = key.view, .value = value.view};
  if (forward_pass) {
    forward(plan, in, output.view, logsumexp.view, &stream);
  } else {
    const AttentionGradients all = {.query = dq.view, .key = dk.view, .value = dv.view};
    backward(plan, in, {.output = output.view, .logsumexp = logsumexp.view, .grad_output = output.view},
             query_only ? AttentionGradients{.query = dq.view} : all, &stream);
  }
  const std::lock_guard lock(fake.mutex);
  std::vector<std::string> list;
  for (const FakeLaunch& launch : fake.launches) {
    bool followed = false;
    if (launch.kernel == "sm90_backward") followed = args_of<gpu::Sm90BackwardArgs>(launch).backward.followed;
    else if (!forward_pass) followed = args_of<gpu::BackwardArgs>(launch).followed;
    list.push_back((launch.overlaps ? "> " : "") + launch.kernel + (followed ? " >" : ""));
  }
  return list;
}

using List = std::vector<std::string>;

TEST(Overlap, GradientsByOneKernel) {
  const Plan plan = choose_plan(dense_problem(1000, 700), {.engine = Engine::sm90, .gpu = kH100});
  EXPECT_EQ(launches_of(plan, false), (List{"delta >", "> sm90_backward >", "> convert"}));
}

TEST(Overlap, GradientsByTwo) {
  const Plan plan =
      choose_plan(dense_problem(1000, 700),
                  {.engine = Engine::sm90, .backward = {.deterministic = true, .kv_parallelism = false}, .gpu = kH100});
  EXPECT_EQ(launches_of(plan, false), (List{"delta >", "> sm90_backward >", "> sm90_backward"}));
  EXPECT_EQ(launches_of(plan, false, true), (List{"delta >", "> sm90_backward"})) << "of queries alone";
}

TEST(Overlap, GradientsOfSmallWindows) {
  const auto plan_of = [](std::int64_t window) {
    Problem p = problem_of({56, 56}, {.kernel_size = window});
    p.batch = 16;
    p.heads = p.heads_kv = 4;
    return choose_plan(p, {.gpu = kH100});
  };
  EXPECT_EQ(launches_of(plan_of(13), false), (List{"sm90_backward >", "> sm90_backward"}));
  EXPECT_EQ(launches_of(plan_of(13), false, true), (List{"sm90_backward"})) << "followed by what others launch";
  EXPECT_EQ(launches_of(plan_of(7), false), (List{"backward_queries >", "> sm90_backward"}));
}

TEST(Overlap, GradientsOfGroupsInParts) {
  Problem p = dense_problem(1000, 700);
  p.batch = 1;
  p.heads = 8;
  p.heads_kv = 1;
  const Plan plan = choose_plan(p, {.engine = Engine::sm90, .gpu = kH100});
  ASSERT_GT(plan.gpu.backward.keys.key_parts, 1);
  EXPECT_EQ(launches_of(plan, false), (List{"delta >", "> sm90_backward >", "> convert_keys >", "> convert"}));
}

TEST(Overlap, PartsOfTheKeysAndTheirMerge) {
  Problem p = dense_problem(1, 8192);
  p.batch = 1;
  const Plan plan = choose_plan(p, {.engine = Engine::sm90, .gpu = kH100});
  ASSERT_GT(plan.gpu.forward.key_parts, 1);
  EXPECT_EQ(launches_of(plan, true), (List{"sm90_forward", "> merge_parts"}));
}

TEST(Overlap, TheOtherEngine) {
  const Plan plan =
      choose_plan(dense_problem(300, 200), {.engine = Engine::sm80, .backward = {.deterministic = true}, .gpu = kH100});
  EXPECT_EQ(launches_of(plan, false), (List{"delta >", "> backward_queries >", "> backward_keys"}));
}

}  // namespace
}  // namespace vicus
