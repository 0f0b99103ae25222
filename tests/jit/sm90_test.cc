// Engine sm90 without a GPU: what it takes, how its tiles are counted, what its calls do to the driver.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/domain.h"
#include "device_tensor.h"
#include "fake_cuda.h"
#include "gpu/sm90_args.h"
#include "hopper_problems.h"
#include "vicus/geometry.h"
#include "vicus/vicus.hpp"

namespace vicus {
namespace {

using vicus::testing::dense_problem;
using vicus::testing::fake_cuda;
using vicus::testing::kH100;
using vicus::testing::problem_of;
using vicus::testing::Tensor;

// Pairs of all (query, key) tiles in which a warpgroup's box sees something, one tile after the other.
double counted(const Plan& plan) {
  using geometry::ceil_div, geometry::lo, geometry::Span;
  const GpuKernelPlan& k = plan.gpu.forward;
  const int warpgroups = k.tile.rows / 64;
  double pairs = 0;
  const Domain domain(plan.problem);
  for (std::int64_t i = 0; i < domain.size(); ++i) {
    const geometry::Grid grid = domain.cell(i).grid;
    std::array<int, 3> at{};
    const auto tile_of = [&](int a) {
      const auto n = static_cast<std::size_t>(a);
      return geometry::tile_span(at[n], k.tile.extent[n], grid.axis[a].queries);
    };
    const auto visit = [&] {
      for (int w = 0; w < warpgroups; ++w) {
        double seen = 1;
        for (int a = 0; a < 3; ++a) {
          const auto n = static_cast<std::size_t>(a);
          const Span tile = tile_of(a), keys = geometry::hull(grid.axis[a], tile);
          const int extent = k.tile.extent[n] / (a == k.stack_axis ? warpgroups : 1);
          const int begin = tile.begin + (a == k.stack_axis ? w * extent : 0);
          const Span box = {lo(begin, tile.end), lo(begin + extent, tile.end)};
          int tiles = 0;
          for (int key = keys.begin; key < keys.end; key += k.kv_tile[n]) {
            tiles += geometry::classify(grid.axis[a], box, {key, key + k.kv_tile[n]}) != geometry::TileClass::empty;
          }
          seen *= tiles;
        }
        pairs += seen * 64 * k.kv_tile[0] * k.kv_tile[1] * k.kv_tile[2];
      }
    };
    const auto tiles = [&](int a) {
      return ceil_div(grid.axis[a].queries, k.tile.extent[static_cast<std::size_t>(a)]);
    };
    for (at[0] = 0; at[0] < tiles(0); ++at[0]) {
      for (at[1] = 0; at[1] < tiles(1); ++at[1]) {
        for (at[2] = 0; at[2] < tiles(2); ++at[2]) visit();
      }
    }
  }
  const std::int64_t group = plan.problem.heads / plan.problem.heads_kv;
  const std::int64_t tiles_of_group = (group + k.tile.heads - 1) / k.tile.heads;
  return pairs * static_cast<double>(plan.problem.heads_kv * tiles_of_group);
}

TEST(Boxes, WorkIsCountedExactly) {
  const Problem problems[] = {
      problem_of({1000}, {.kernel_size = 100}),
      problem_of({1000}, {.kernel_size = 77, .stride = 5, .dilation = 3, .is_causal = 1}, 128),
      problem_of({56, 56}, {.kernel_size = 7}),
      problem_of({61, 45}, {.kernel_size = {20, 31}, .stride = {4, 1}, .dilation = {2, 1}, .is_causal = {0, 1}}, 256),
      problem_of({9, 17, 30}, {.kernel_size = {3, 8, 5}, .dilation = {1, 2, 1}}, 96),
      dense_problem(1000, 700),
      dense_problem(333, 1000, {.causal = Causal::bottom_right}),
      dense_problem(1000, 333, {.causal = Causal::bottom_right}),
      dense_problem(1000, 1000, {.window_left = 50, .window_right = 3}),
  };
  for (Problem p : problems) {
    p.heads = p.rank() == 3 ? 2 : 12;
    const Plan plan = choose_plan(p, {.engine = Engine::sm90, .gpu = kH100});
    ASSERT_EQ(plan.gpu.forward.family, GpuKernels::warpgroups);
    EXPECT_DOUBLE_EQ(plan.gpu.forward.work.tile_pairs, counted(plan)) << describe(plan);
    EXPECT_GE(plan.gpu.forward.work.ratio(), 1);
  }
}

TEST(Boxes, ProblemsWithoutTokensHavePlans) {
  for (Problem p : {dense_problem(100, 100), dense_problem(1, 100), dense_problem(0, 100),
                    problem_of({50, 60}, {.kernel_size = 7}), problem_of({5, 6, 7}, {.kernel_size = 3})}) {
    if (p.queries() > 0) p.batch = 0;
    const Plan plan = choose_plan(p, {.engine = Engine::sm90, .gpu = kH100});
    EXPECT_EQ(plan.gpu.forward.family, GpuKernels::warpgroups);
    EXPECT_EQ(plan.gpu.forward.blocks, 0);
    EXPECT_GT(plan.gpu.backward.keys.tile.rows, 0);
  }
}

TEST(Boxes, WhatTheEngineTakes) {
  const auto refused = [](const Problem& p, const std::string& part) {
    const std::string why = supports(p, Engine::sm90);
    EXPECT_NE(why.find(part), std::string::npos) << why;
    EXPECT_THROW((void)choose_plan(p, {.engine = Engine::sm90, .gpu = kH100}), Unsupported);
    EXPECT_EQ(choose_plan(p, {.gpu = kH100}).engine, Engine::sm80) << "whatever sm90 refuses";
  };
  Problem p = problem_of({64, 64}, {.kernel_size = 15});
  EXPECT_EQ(supports(p, Engine::sm90), "");
  EXPECT_EQ(choose_plan(p, {.gpu = kH100}).engine, Engine::sm90);
  EXPECT_EQ(choose_plan(p, {.engine = Engine::sm80, .gpu = kH100}).engine, Engine::sm80);
  EXPECT_EQ(choose_plan(p, {.gpu = {10, 0, 148, 232448}}).engine, Engine::sm80);
  EXPECT_THROW((void)choose_plan(p, {.engine = Engine::sm90, .gpu = {8, 0, 108, 166912}}), Unsupported);
  p.head_dim = 63;
  refused(p, "head_dim in multiples of 8 up to 256, it is 63");
  p.head_dim = 264;
  refused(p, "it is 264");
  p.head_dim = 40;
  p.head_dim_v = 20;
  refused(p, "head_dim_v in multiples of 8");
  p.head_dim_v = 40;
  EXPECT_EQ(supports(p, Engine::sm90), "");
  p.dtype = DType::float32;
  refused(p, "dtype is float32");
  p.dtype = DType::float16;
  p.rpb = true;
  refused(p, "no rpb");
  p.rpb = false;
  p.scale = -1;
  refused(p, "scale > 0");
  p.scale = {};
  p.mask = Neighborhood{.kernel_size = 2, .dilation = {1, 9}};
  refused(p, "dilation up to 8, it is 9");
  EXPECT_EQ(supports(problem_of({8, 16, 16}, {.kernel_size = 5}, 40), Engine::sm90), "");
  EXPECT_EQ(choose_plan(dense_problem(1, 5000), {.gpu = kH100}).engine, Engine::sm90);
  Problem packed = dense_problem(900, 900, {.device = {.sequences = 3, .max_queries = 500, .max_keys = 500}});
  packed.batch = 1;
  EXPECT_EQ(choose_plan(packed, {.gpu = kH100}).engine, Engine::sm90);
  EXPECT_EQ(choose_plan(dense_problem(900, 900, {.device = {.key_lengths = true}}), {.gpu = kH100}).engine,
            Engine::sm90);
}

TEST(Boxes, KeysAreSharedOutWhereTilesAreTooFew) {
  Problem p = dense_problem(1, 8192);
  p.heads = 64;
  p.heads_kv = 8;
  p.batch = 1;
  const Plan plan = choose_plan(p, {.gpu = kH100});
  EXPECT_EQ(plan.engine, Engine::sm90);
  const GpuKernelPlan& k = plan.gpu.forward;
  EXPECT_EQ(k.tile.heads, 8);
  EXPECT_EQ(k.blocks, 8);
  EXPECT_GE(k.blocks * k.key_parts, kH100.multiprocessors / 2);
  EXPECT_LE(k.blocks * k.key_parts, 2 * kH100.multiprocessors);
  EXPECT_EQ(plan.gpu.forward_scratch_bytes, static_cast<std::size_t>(k.key_parts * 64 * (128 + 1) * 4));
  EXPECT_NE(describe(plan).find("keys in " + std::to_string(k.key_parts) + " parts"), std::string::npos);
  p.batch = 256;
  EXPECT_EQ(choose_plan(p, {.engine = Engine::sm90, .gpu = kH100}).gpu.forward.key_parts, 1);
}

TEST(Boxes, KeysOnSeveralAxesAreSharedOutWhereWindowsAreLarge) {
  const auto planned = [](AxisValues layout, AxisValues window, std::int64_t heads) {
    Problem p = problem_of(layout, {.kernel_size = window}, 128);
    p.batch = 1;
    p.heads = p.heads_kv = heads;
    return choose_plan(p, {.gpu = kH100});
  };
  for (const Plan& plan : {planned({64, 64}, 48, 1), planned({12, 24, 24}, {12, 24, 24}, 1)}) {
    EXPECT_EQ(plan.engine, Engine::sm90);
    const GpuKernelPlan& k = plan.gpu.forward;
    EXPECT_GT(k.key_parts, 1);
    EXPECT_LE(k.blocks * k.key_parts, 2 * kH100.multiprocessors);
    EXPECT_EQ(plan.gpu.forward_scratch_bytes,
              static_cast<std::size_t>(k.key_parts * plan.problem.queries() * (128 + 1) * 4));
  }
  EXPECT_EQ(planned({64, 64}, 48, 24).gpu.forward.key_parts, 1);
  // A merge would take longer; the other engine would leave most multiprocessors idle.
  EXPECT_EQ(planned({32, 32}, 24, 1).gpu.forward.key_parts, 1);
  EXPECT_EQ(planned({32, 32}, 24, 1).engine, Engine::sm90);
  EXPECT_EQ(planned({14, 14}, 7, 2).gpu.forward.family, GpuKernels::tensor_cores);
}

TEST(Boxes, EverySequenceHasPlacesForItsTiles) {
  std::mt19937 random(1);
  for (int n = 0; n < 2000; ++n) {
    const int extent = std::array{64, 128, 192, 7}[n % 4], sequences = static_cast<int>(random() % 20) + 1;
    int tokens = 0;
    for (int s = 0; s < sequences; ++s) {
      const int length = static_cast<int>(random() % 3 == 0 ? 0 : random() % 500);
      const int places = gpu::places_before(tokens + length, s + 1, extent) - gpu::places_before(tokens, s, extent);
      const int tiles = geometry::ceil_div(length, extent);
      EXPECT_GE(places, tiles);
      EXPECT_LE(places, tiles + 1);
      tokens += length;
    }
  }
}

TEST(Boxes, TilesThatAreNamedAreTaken) {
  const Problem p = problem_of({256, 256}, {.kernel_size = 80}, 128);
  PlanOptions options{.engine = Engine::sm90, .gpu = kH100};
  const Plan free = choose_plan(p, options);
  ASSERT_GT(free.candidates.size(), 3U);
  EXPECT_EQ(free.candidates[0].kv_tile, free.gpu.forward.kv_tile);
  for (std::size_t i = 1; i < free.candidates.size(); ++i) {
    EXPECT_GE(free.candidates[i].cost, free.candidates[i - 1].cost);
  }
  options.tile_q = {0, 4, 32};
  options.tile_kv = {0, 9, 16};
  const Plan named = choose_plan(p, options);
  EXPECT_EQ(named.gpu.forward.tile.extent, (std::array{1, 4, 32}));
  EXPECT_EQ(named.gpu.forward.kv_tile, (std::array{1, 9, 16}));
  EXPECT_DOUBLE_EQ(named.gpu.forward.work.tile_pairs, counted(named));
  options.tile_kv = {0, 7, 7};
  EXPECT_EQ(choose_plan(p, options).gpu.forward.kv_tile, free.gpu.forward.kv_tile) << "there is no such tile";
}

TEST(Boxes, CallsGoToTheOtherKernelWhereBoxesCannotBeAddressed) {
  auto& fake = fake_cuda();
  {
    const std::lock_guard lock(fake.mutex);
    fake.arg_bytes["sm90_forward"] = sizeof(gpu::Sm90Args);
    fake.events.clear();
  }
  Problem problem = problem_of({40, 50}, {.kernel_size = 9}, 32);
  problem.additional_tokens = 3;
  const Plan plan = choose_plan(problem, {.gpu = kH100});
  const Problem& p = plan.problem;
  ASSERT_EQ(plan.engine, Engine::sm90);
  const Tensor query(p.dtype, p.query_shape()), key(p.dtype, p.key_shape()), value(p.dtype, p.value_shape());
  const Tensor shifted(p.dtype, p.key_shape(), 1), output(p.dtype, p.output_shape());
  const Tensor more_keys(p.dtype, p.additional_keys_shape()), more_values(p.dtype, p.additional_values_shape());
  int stream = 0;
  const auto launched = [&](AttentionInputs in) {
    in.additional_keys = more_keys.view;
    in.additional_values = more_values.view;
    {
      const std::lock_guard lock(fake.mutex);
      fake.events.clear();
    }
    forward(plan, in, output.view, {}, &stream);
    const std::lock_guard lock(fake.mutex);
    return fake.events;
  };
  const std::string threads = std::to_string(plan.gpu.forward.warps * 32 + 128);
  std::vector<std::string> seen = launched({.query = query.view, .key = key.view, .value = value.view});
  ASSERT_EQ(std::count(seen.begin(), seen.end(), "map"), 5);
  EXPECT_EQ(seen.back(), "launch sm90_forward " + threads);
  seen = launched({.query = query.view, .key = shifted.view, .value = value.view});
  EXPECT_TRUE(seen.back().starts_with("launch forward ")) << seen.back();
  // One batch entry for all: the copy engine has no stride of zero.
  std::vector<std::int64_t> strides(static_cast<std::size_t>(key.view.dims()));
  for (int i = 0; i < key.view.dims(); ++i) strides[static_cast<std::size_t>(i)] = i == 0 ? 0 : key.view.stride(i);
  const std::vector<std::int64_t> shape = p.key_shape();
  const ConstTensorView shared(key.view.data(), p.dtype, TensorLayout(std::span(shape), std::span(strides)));
  seen = launched({.query = query.view, .key = shared, .value = value.view});
  EXPECT_TRUE(seen.back().starts_with("launch forward ")) << seen.back();
}

// Pairs of all tiles of queries in which a warpgroup's box of keys is seen by something, for windows alike from both sides.
double counted_from_keys(const Plan& plan) {
  Plan turned = plan;
  turned.gpu.forward = plan.gpu.backward.keys;
  std::swap(turned.gpu.forward.tile.extent, turned.gpu.forward.kv_tile);
  return counted(turned);
}

TEST(Boxes, GradientsHaveBoxesOfKeysAndOfQueries) {
  for (const std::int64_t head_dim : {40, 64, 128}) {
    for (const bool deterministic : {false, true}) {
      Problem p = problem_of({128, 128}, {.kernel_size = 40}, head_dim);
      p.heads = 4;
      PlanOptions options{.engine = Engine::sm90, .gpu = kH100};
      options.backward.deterministic = deterministic;
      const Plan plan = choose_plan(p, options);
      const GpuGradientPlan& g = plan.gpu.backward;
      ASSERT_EQ(g.keys.family, GpuKernels::warpgroups) << describe(plan);
      EXPECT_EQ(g.add_queries, !deterministic);
      EXPECT_EQ(plan.gpu.backward_unboxed.add_queries, !deterministic);
      EXPECT_DOUBLE_EQ(g.keys.work.tile_pairs, counted_from_keys(plan)) << describe(plan);
      const auto rows = static_cast<std::size_t>(p.batch * p.queries() * p.heads);
      const auto sums = static_cast<std::size_t>((head_dim + 15) / 16 * 16) * 4;
      EXPECT_EQ(g.scratch_bytes, rows * (8 + (deterministic ? 0 : sums))) << "logsumexp and delta, sums";
      EXPECT_EQ(plan.backward.kv_splits > 1, !deterministic);
      if (!deterministic) {
        EXPECT_EQ(g.queries.tile.rows, 0);
        continue;
      }
      EXPECT_EQ(g.queries.family, GpuKernels::warpgroups);
      Plan of_queries = plan;
      of_queries.gpu.forward = g.queries;
      EXPECT_DOUBLE_EQ(g.queries.work.tile_pairs, counted(of_queries)) << describe(plan);
    }
  }
  const auto portable = [](const Problem& p) {
    return choose_plan(p, {.gpu = kH100}).gpu.backward.keys.family == GpuKernels::tensor_cores;
  };
  EXPECT_FALSE(portable(problem_of({128, 128}, {.kernel_size = 40}, 256)));
  EXPECT_FALSE(portable(dense_problem(1000, 700, {.key_lengths = {100, 300}})));
  Problem packed = dense_problem(1000, 700, {.cumulative_queries = {0, 900, 1000}, .cumulative_keys = {0, 0, 700}});
  packed.batch = 1;
  EXPECT_FALSE(portable(packed));
  Problem wide = dense_problem(1000, 1000);
  wide.head_dim = 192;
  EXPECT_FALSE(portable(wide)) << "192 and 128 fit together";
}

TEST(Boxes, LongHeadDimsHaveAKernelForEachGradient) {
  for (const auto& [head_dim, head_dim_v] : {std::pair(256, 256), std::pair(192, 160), std::pair(64, 256)}) {
    for (const bool deterministic : {false, true}) {
      Problem p = problem_of({128, 128}, {.kernel_size = 40}, head_dim);
      p.head_dim_v = head_dim_v;
      PlanOptions options{.engine = Engine::sm90, .gpu = kH100};
      options.backward.deterministic = deterministic;
      Plan plan = choose_plan(p, options);
      const GpuGradientPlan g = plan.gpu.backward;
      EXPECT_FALSE(g.add_queries);
      for (const GpuKernelPlan* const kernel : {&g.queries, &g.keys, &g.values}) {
        ASSERT_EQ(kernel->family, GpuKernels::warpgroups) << describe(plan);
        EXPECT_GT(kernel->second_stages, 0);
        EXPECT_EQ(kernel->tile.rows, 128);
      }
      EXPECT_EQ(g.scratch_bytes, static_cast<std::size_t>(p.batch * p.queries() * p.heads) * 8);
      EXPECT_DOUBLE_EQ(g.keys.work.tile_pairs, counted_from_keys(plan)) << describe(plan);
      plan.gpu.backward.keys = g.values;
      EXPECT_DOUBLE_EQ(g.values.work.tile_pairs, counted_from_keys(plan)) << describe(plan);
      plan.gpu.forward = g.queries;
      EXPECT_DOUBLE_EQ(g.queries.work.tile_pairs, counted(plan)) << describe(plan);
    }
  }
}

TEST(Boxes, GradientsGoToTheOtherKernelsWhereBoxesCannotBeAddressed) {
  auto& fake = fake_cuda();
  {
    const std::lock_guard lock(fake.mutex);
    fake.arg_bytes["sm90_backward"] = sizeof(gpu::Sm90BackwardArgs);
    fake.launches.clear();
    fake.events.clear();
  }
  Problem problem = problem_of({80, 90}, {.kernel_size = 31}, 128);
  problem.additional_tokens = 3;
  const Plan plan = choose_plan(problem, {.gpu = kH100});
  const Problem& p = plan.problem;
  ASSERT_EQ(plan.gpu.backward.keys.family, GpuKernels::warpgroups);
  const Tensor query(p.dtype, p.query_shape()), key(p.dtype, p.key_shape()), value(p.dtype, p.value_shape());
  const Tensor output(p.dtype, p.output_shape()), grad(p.dtype, p.output_shape()),
      shifted(p.dtype, p.output_shape(), 1);
  const Tensor logsumexp(DType::float32, p.logsumexp_shape());
  const Tensor more_keys(p.dtype, p.additional_keys_shape()), more_values(p.dtype, p.additional_values_shape());
  const Tensor dq(p.dtype, p.query_shape()), dk(p.dtype, p.key_shape()), dv(p.dtype, p.value_shape());
  const Tensor d_more_keys(p.dtype, p.additional_keys_shape()), d_more_values(p.dtype, p.additional_values_shape());
  const AttentionInputs in = {.query = query.view,
                              .key = key.view,
                              .value = value.view,
                              .additional_keys = more_keys.view,
                              .additional_values = more_values.view};
  const AttentionGradients out = {.query = dq.view,
                                  .key = dk.view,
                                  .value = dv.view,
                                  .additional_keys = d_more_keys.view,
                                  .additional_values = d_more_values.view};
  int stream = 0;
  const auto launched = [&](const Tensor& grad_output) {
    {
      const std::lock_guard lock(fake.mutex);
      fake.events.clear();
    }
    backward(plan, in, {.output = output.view, .logsumexp = logsumexp.view, .grad_output = grad_output.view}, out,
             &stream);
    const std::lock_guard lock(fake.mutex);
    std::vector<std::string> names;
    for (const std::string& event : fake.events) {
      if (event.starts_with("launch ")) names.push_back(event.substr(7, event.find(' ', 7) - 7));
    }
    return names;
  };
  EXPECT_EQ(launched(grad), (std::vector<std::string>{"delta", "sm90_backward", "sm90_backward", "backward_keys"}));
  EXPECT_EQ(launched(shifted), (std::vector<std::string>{"delta", "backward_keys", "backward_keys", "convert"}));
}

}  // namespace
}  // namespace vicus
