// Gradients of engine sm90 by several blocks on a multiprocessor: when they are planned, and which kernels a call has.
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "gpu/kernels.h"
#include "hopper_problems.h"
#include "vicus/vicus.hpp"

namespace vicus {
namespace {

using vicus::testing::kH100;
using vicus::testing::problem_of;

Plan planned(std::int64_t batch, std::int64_t heads, Problem p) {
  p.batch = batch;
  p.heads = p.heads_kv = heads;
  PlanOptions options{.gpu = kH100};
  options.backward.deterministic = true;
  return choose_plan(p, options);
}

TEST(Crowds, GradientsOfSmallWindowsShareMultiprocessors) {
  constexpr int kSharedBytes = 228 * 1024, kReserved = 1024;  // of a multiprocessor; what it keeps of a block's
  for (const Plan& plan : {planned(16, 4, problem_of({56, 56}, {.kernel_size = 13})),
                           planned(8, 12, problem_of({64, 64}, {.kernel_size = 16})),
                           planned(8, 8, problem_of({8, 32, 32}, {.kernel_size = {4, 8, 8}}))}) {
    const GpuGradientPlan& g = plan.gpu.backward;
    EXPECT_EQ(g.keys.blocks_per_multiprocessor, 2) << describe(plan);
    EXPECT_EQ(g.queries.blocks_per_multiprocessor, 3) << describe(plan);
    gpu::Call call{.backward = true};
    std::vector<gpu::Kernel> kernels;
    for (const gpu::Spec& spec : gpu::kernels_of(plan, call)) {
      kernels.push_back(spec.kernel);
      EXPECT_EQ(spec.threads(), 128) << "none but the math";
      EXPECT_LE(spec.min_blocks * (gpu::shared_bytes(spec) + kReserved), kSharedBytes);
    }
    EXPECT_EQ(kernels, (std::vector{gpu::Kernel::sm90_queries, gpu::Kernel::sm90_keys})) << "the first one makes delta";
    call.grad_query = false;
    EXPECT_EQ(gpu::kernels_of(plan, call).begin()->kernel, gpu::Kernel::delta);
  }
}

TEST(Crowds, OtherGradientsDoNot) {
  // By several warpgroups, where tiles are seen as a whole, rows are long or head dims are.
  for (const Plan& plan : {planned(1, 24, problem_of({256, 256}, {.kernel_size = 80})),
                           planned(8, 8, problem_of({4096}, {.kernel_size = 64})),
                           planned(8, 4, problem_of({56, 56}, {.kernel_size = 13}, 256))}) {
    const GpuGradientPlan& g = plan.gpu.backward;
    ASSERT_EQ(g.keys.family, GpuKernels::warpgroups) << describe(plan);
    EXPECT_EQ(g.keys.blocks_per_multiprocessor, 1) << describe(plan);
    EXPECT_EQ(g.queries.blocks_per_multiprocessor, 1) << describe(plan);
    EXPECT_EQ(gpu::kernels_of(plan, gpu::Call{.backward = true}).begin()->kernel, gpu::Kernel::delta);
  }
}

}  // namespace
}  // namespace vicus
