// Packed sequences and key padding on the GPU, as the driver sees them: grids of the longest sequences, where kernels read
// the lists, what is copied, what a capture refuses.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "device_tensor.h"
#include "fake_cuda.h"
#include "gpu/plain_args.h"
#include "gpu/rest_args.h"
#include "gpu/sm90_args.h"
#include "jit/device.h"
#include "jit/driver.h"
#include "launched.h"
#include "vicus/vicus.hpp"

namespace vicus {
namespace {

using vicus::testing::args_of;
using vicus::testing::fake_cuda;
using vicus::testing::FakeCuda;
using vicus::testing::FakeLaunch;
using vicus::testing::Tensor;

constexpr std::int64_t kSequences = 5, kMaxQueries = 300, kMaxKeys = 200;
constexpr std::int64_t kBatch = 3;

class GpuLists : public ::testing::Test {  // NOLINT(cppcoreguidelines-virtual-class-destructor): GoogleTest's way
 protected:
  GpuLists() {
    forget();
    fake.arg_bytes["forward"] = sizeof(gpu::ForwardArgs);
    fake.arg_bytes["plain_forward"] = sizeof(gpu::PlainForwardArgs);
    for (const char* const name : {"plain_backward_queries", "plain_backward_keys", "plain_backward_additional"}) {
      fake.arg_bytes[name] = sizeof(gpu::PlainBackwardArgs);
    }
    for (const char* const name : {"delta", "backward_queries", "backward_keys", "convert"}) {
      fake.arg_bytes[name] = sizeof(gpu::BackwardArgs);
    }
    fake.arg_bytes["packed_rest"] = sizeof(gpu::RestArgs);
    fake.arg_bytes["sm90_backward"] = sizeof(gpu::Sm90BackwardArgs);
    problem.dtype = DType::bfloat16;
    problem.batch = 1;
    problem.layout = 1000;
    problem.heads = 4;
    problem.heads_kv = 2;
    problem.head_dim = 64;
    dense.keys = 900;
  }
  ~GpuLists() override { fake.capture_status = 0; }

  void forget() {
    const std::lock_guard lock(fake.mutex);
    fake.failing_call.clear();
    fake.launches.clear();
    fake.events.clear();
    fake.copied.clear();
  }
  void pack_on_device() {
    dense.device = {.sequences = kSequences, .max_queries = kMaxQueries, .max_keys = kMaxKeys};
    in.cumulative_queries = {at(0), kSequences + 1};
    in.cumulative_keys = {at(100), kSequences + 1};
  }
  [[nodiscard]] const std::int32_t* at(int index) const {
    return static_cast<const std::int32_t*>(lists.view.data()) + index;
  }
  TensorView tensor(const std::vector<std::int64_t>& shape, DType dtype) {
    memory.push_back(std::make_unique<Tensor>(dtype, shape));
    return memory.back()->view;
  }
  /// Plans the problem, takes memory for it and runs both passes.
  void run(bool deterministic = false) {
    problem.mask = dense;
    problem = validate(problem);
    const jit::ContextGuard context(0);
    options.backward.deterministic = deterministic;
    const Plan plan = choose_plan(problem, options);
    const auto like = [&](const std::vector<std::int64_t>& shape) { return tensor(shape, problem.dtype); };
    in.query = like(problem.query_shape());
    in.key = like(problem.key_shape());
    in.value = like(problem.value_shape());
    const TensorView output = like(problem.output_shape());
    const TensorView logsumexp =
        tensor(problem.logsumexp_shape(), problem.dtype == DType::float64 ? DType::float64 : DType::float32);
    const AttentionGradInputs arrived = {
        .output = output, .logsumexp = logsumexp, .grad_output = like(problem.output_shape())};
    const AttentionGradients wanted = {
        .query = like(problem.query_shape()), .key = like(problem.key_shape()), .value = like(problem.value_shape())};
    forget();
    forward(plan, in, output, logsumexp);
    if (fake.capture_status == 0) backward(plan, in, arrived, wanted);
    used = plan;
    rests = {output, logsumexp, wanted.query, wanted.key, wanted.value};
  }
  [[nodiscard]] std::vector<FakeLaunch> launched(const std::string& kernel) const {
    std::vector<FakeLaunch> found;
    for (const FakeLaunch& launch : fake.launches) {
      if (launch.kernel == kernel) found.push_back(launch);
    }
    return found;
  }
  /// Blocks of a grid with as many sequences, tiles of the longest, and heads.
  static std::int64_t blocks(std::int64_t sequences, std::int64_t tokens, int extent, std::int64_t heads) {
    return sequences * ((tokens + extent - 1) / extent) * heads;
  }
  std::int64_t head_tiles(const GpuKernelPlan& plan) const {
    return problem.heads_kv * ((problem.heads / problem.heads_kv + plan.tile.heads - 1) / plan.tile.heads);
  }

  FakeCuda& fake = fake_cuda();
  PlanOptions options{.engine = Engine::sm80};
  Problem problem;
  Dense dense;
  AttentionInputs in;
  Tensor lists{DType::float32, {1 << 10}};  // memory for int32
  std::vector<std::unique_ptr<Tensor>> memory;
  Plan used;
  std::vector<TensorView> rests;
};

TEST_F(GpuLists, GridsAreOfTheLongestSequencesAndKernelsReadTheCallersLists) {
  for (const bool deterministic : {false, true}) {
    pack_on_device();
    run(deterministic);
    const GpuPlan& plan = used.gpu;
    ASSERT_EQ(launched("forward").size(), 1U);
    const FakeLaunch forward = launched("forward")[0];
    EXPECT_EQ(forward.grid[0], blocks(kSequences, kMaxQueries, plan.forward.tile.extent[2], head_tiles(plan.forward)));
    const auto seen = args_of<gpu::ForwardArgs>(forward);
    EXPECT_EQ(seen.cumulative_queries, in.cumulative_queries.data());
    EXPECT_EQ(seen.cumulative_keys, in.cumulative_keys.data());
    EXPECT_EQ(seen.key_lengths, nullptr);
    EXPECT_EQ(seen.len[2], 1000) << "all tokens, which lists are clamped to";
    EXPECT_EQ(seen.keys, 900);

    ASSERT_EQ(launched("backward_keys").size(), 1U);
    const FakeLaunch keys = launched("backward_keys")[0];
    EXPECT_EQ(keys.grid[0], blocks(kSequences, kMaxKeys, plan.backward.keys.kv_tile[2], problem.heads_kv));
    const auto back = args_of<gpu::BackwardArgs>(keys);
    EXPECT_EQ(back.cumulative_queries, in.cumulative_queries.data());
    EXPECT_EQ(back.sequences, kSequences);
    EXPECT_EQ(back.batch, 1);
    ASSERT_EQ(launched("backward_queries").size(), deterministic ? 1U : 0U);
    if (deterministic) {
      const auto& queries = plan.backward.queries;
      EXPECT_EQ(launched("backward_queries")[0].grid[0],
                blocks(kSequences, kMaxQueries, queries.tile.extent[2], head_tiles(queries)));
    }
    ASSERT_EQ(launched("delta").size(), 1U);
    EXPECT_EQ(launched("delta")[0].grid[0], (1000 * 4 + 31) / 32) << "rows of all tokens";
    EXPECT_TRUE(fake.copied.empty());
  }
}

TEST_F(GpuLists, WhatFollowsTheLastSequenceIsWritten) {
  pack_on_device();
  run();
  const std::vector<FakeLaunch> launches = launched("packed_rest");
  ASSERT_EQ(launches.size(), 2U) << "one of each pass";
  EXPECT_EQ(launches[0].threads, 256U);
  std::size_t next = 0;
  for (const FakeLaunch& launch : launches) {
    const auto args = args_of<gpu::RestArgs>(launch);
    for (int i = 0; i < args.count; ++i, ++next) {
      const gpu::Rest& rest = args.rests[i];
      const bool of_keys = next >= 3, is_logsumexp = next == 1;
      EXPECT_EQ(rest.rows.data, rests.at(next).data());
      EXPECT_EQ(rest.begin, at(of_keys ? 100 : 0) + kSequences) << "the end of the last sequence";
      EXPECT_EQ(rest.tokens, of_keys ? 900 : 1000);
      EXPECT_EQ(rest.heads, of_keys ? 2 : 4);
      EXPECT_EQ(rest.width, is_logsumexp ? 1 : 64);
      EXPECT_EQ(rest.bytes, is_logsumexp ? 4 : 2);
      EXPECT_EQ(rest.value, is_logsumexp ? 0xff800000 : 0);
    }
  }
  EXPECT_EQ(next, rests.size());
}

TEST_F(GpuLists, KernelsWithoutTensorCoresReadThemToo) {
  problem.dtype = DType::float64;
  problem.additional_tokens = 3;
  const TensorView more = tensor({1, 3, 2, 64}, DType::float64);
  in.additional_keys = in.additional_values = more;
  pack_on_device();
  run();
  const GpuPlan& plan = used.gpu;
  const auto grid_x = [&](const char* kernel) { return std::int64_t{launched(kernel).at(0).grid[0]}; };
  EXPECT_EQ(grid_x("plain_forward"),
            blocks(kSequences, kMaxQueries, plan.forward.tile.extent[2], head_tiles(plan.forward)));
  const auto seen = args_of<gpu::PlainForwardArgs>(launched("plain_forward").at(0));
  EXPECT_EQ(seen.forward.cumulative_queries, in.cumulative_queries.data());
  EXPECT_EQ(seen.forward.cumulative_keys, in.cumulative_keys.data());
  const GpuKernelPlan& queries = plan.backward.queries;
  EXPECT_EQ(grid_x("plain_backward_queries"),
            blocks(kSequences, kMaxQueries, queries.tile.extent[2], head_tiles(queries)));
  EXPECT_EQ(grid_x("plain_backward_keys"), blocks(kSequences, kMaxKeys, plan.backward.keys.kv_tile[2], 2));
  const auto back = args_of<gpu::PlainBackwardArgs>(launched("plain_backward_keys").at(0));
  EXPECT_EQ(back.forward.cumulative_keys, in.cumulative_keys.data());
  EXPECT_EQ(back.cells, kSequences);
  EXPECT_EQ(back.batch, 1);
  ASSERT_EQ(launched("packed_rest").size(), 2U);
  const auto rest = args_of<gpu::RestArgs>(launched("packed_rest")[0]);
  EXPECT_EQ(rest.rests[0].bytes, 8);
  EXPECT_EQ(rest.rests[1].bytes, 8);
  EXPECT_EQ(rest.rests[1].value, 0xfff0000000000000);
}

TEST_F(GpuLists, KeyLengthsOfTheDeviceAreReadThere) {
  problem.batch = kBatch;
  dense.device.key_lengths = true;
  in.key_lengths = {at(7), kBatch};
  run();
  ASSERT_EQ(launched("forward").size(), 1U);
  const auto seen = args_of<gpu::ForwardArgs>(launched("forward")[0]);
  EXPECT_EQ(seen.key_lengths, at(7));
  EXPECT_EQ(seen.cumulative_queries, nullptr);
  EXPECT_EQ(launched("forward")[0].grid[0],
            blocks(kBatch, 1000, used.gpu.forward.tile.extent[2], head_tiles(used.gpu.forward)));
  EXPECT_EQ(launched("backward_keys")[0].grid[0],
            blocks(kBatch, 900, used.gpu.backward.keys.kv_tile[2], problem.heads_kv));
  EXPECT_TRUE(launched("packed_rest").empty()) << "padding belongs to its batch entry";
}

TEST_F(GpuLists, GradientsByBoxesHavePlacesThatSequencesShare) {
  options = {.engine = Engine::sm90, .gpu = {9, 0, 132, 232448}};
  pack_on_device();
  run(true);
  const GpuGradientPlan& plan = used.gpu.backward;
  ASSERT_EQ(plan.keys.family, GpuKernels::warpgroups);
  const std::vector<FakeLaunch> launches = launched("sm90_backward");
  ASSERT_EQ(launches.size(), 2U) << "of queries, then of keys";
  const auto of_queries = args_of<gpu::Sm90BackwardArgs>(launches[0]);
  const auto of_keys = args_of<gpu::Sm90BackwardArgs>(launches[1]);
  EXPECT_EQ(of_queries.backward.order.all.value, gpu::places_before(1000, kSequences, plan.queries.tile.extent[2]));
  EXPECT_EQ(of_keys.backward.order.all.value, gpu::places_before(900, kSequences, plan.keys.kv_tile[2]));
  EXPECT_EQ(launches[0].grid[0], of_queries.backward.order.all.value * problem.heads);
  EXPECT_EQ(launches[1].grid[0], of_keys.backward.order.all.value * problem.heads_kv * plan.keys.key_parts);
  EXPECT_EQ(of_keys.backward.cumulative_queries, in.cumulative_queries.data());
  EXPECT_EQ(of_keys.backward.cumulative_keys, in.cumulative_keys.data());
  EXPECT_EQ(of_keys.backward.sequences, kSequences);
  EXPECT_EQ(launched("packed_rest").size(), 2U) << "one of each pass";

  problem.batch = kBatch;
  dense.device = {.key_lengths = true};
  in = {.key_lengths = {at(7), kBatch}};
  run(true);
  ASSERT_EQ(launched("sm90_backward").size(), 2U);
  const FakeLaunch keys = launched("sm90_backward")[1];
  EXPECT_EQ(keys.grid[0], blocks(kBatch, 900, used.gpu.backward.keys.kv_tile[2], problem.heads_kv) *
                              static_cast<unsigned>(used.gpu.backward.keys.key_parts))
      << "padding too";
  EXPECT_EQ(args_of<gpu::Sm90BackwardArgs>(keys).backward.key_lengths, at(7));
  EXPECT_TRUE(launched("packed_rest").empty());
}

TEST_F(GpuLists, ListsOfTheProblemAreCopiedAndNothingIsLeftOver) {
  dense.cumulative_queries = {0, 300, 300, 1000};
  dense.cumulative_keys = {0, 10, 500, 900};
  run();
  const std::array<std::int32_t, 8> wanted = {0, 300, 300, 1000, 0, 10, 500, 900};
  EXPECT_EQ(fake.copied, std::string(reinterpret_cast<const char*>(wanted.data()), sizeof(wanted)));
  const auto seen = args_of<gpu::ForwardArgs>(launched("forward")[0]);
  EXPECT_EQ(seen.cumulative_keys - seen.cumulative_queries, 4);
  EXPECT_EQ(launched("forward")[0].grid[0],
            blocks(3, 700, used.gpu.forward.tile.extent[2], head_tiles(used.gpu.forward)));
  EXPECT_EQ(launched("backward_keys")[0].grid[0], blocks(3, 490, used.gpu.backward.keys.kv_tile[2], problem.heads_kv));
  EXPECT_TRUE(launched("packed_rest").empty()) << "such lists end where the tokens do";

  problem.batch = kBatch;
  dense.cumulative_queries = dense.cumulative_keys = {};
  dense.key_lengths = {0, 900, 5};
  run();
  const std::array<std::int32_t, 3> lengths = {0, 900, 5};
  EXPECT_EQ(fake.copied, std::string(reinterpret_cast<const char*>(lengths.data()), sizeof(lengths)));
  EXPECT_NE(args_of<gpu::ForwardArgs>(launched("forward")[0]).key_lengths, nullptr);
}

TEST_F(GpuLists, CopiesAreNoPartOfAGraphAndDeviceListsAre) {
  dense.cumulative_queries = {0, 1000};
  dense.cumulative_keys = {0, 900};
  run();  // everything is compiled
  fake.capture_status = 1;
  try {
    run();
    ADD_FAILURE() << "no error";
  } catch (const Unsupported& error) {
    for (const char* const part : {"CUDA graph", "Dense::device", "cumulative_queries"}) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  }
  EXPECT_TRUE(fake.events.empty()) << "nothing was queued";
  fake.capture_status = 0;
  dense.cumulative_queries = dense.cumulative_keys = {};
  pack_on_device();
  run();
  fake.capture_status = 1;
  run();
  EXPECT_EQ(launched("forward").size(), 1U);
}

TEST_F(GpuLists, OfEngineSm90OnlyTheTilesThatTokensFillCount) {
  constexpr int kMany = 1 << 20, kTokens = 1 << 16;
  options = {.engine = Engine::sm90, .gpu = {9, 0, 132, 232448}};
  problem.layout = kTokens;
  problem.heads = problem.heads_kv = 8;
  dense.keys = kTokens;
  dense.causal = Causal::top_left;
  dense.device = {.sequences = kMany, .max_queries = kTokens, .max_keys = kTokens};
  in.cumulative_queries = in.cumulative_keys = {at(0), kMany + 1};
  run(true);  // tiles of the longest for each would be more than an int counts
  ASSERT_EQ(launched("sm90_forward").size(), 1U);
  const std::vector<FakeLaunch> launches = launched("sm90_backward");
  ASSERT_EQ(launches.size(), 2U);
  for (const FakeLaunch& launch : launches) EXPECT_LE(launch.grid[0], 8U * (kMany + kTokens / 64));
}

TEST_F(GpuLists, ListsThatAreElsewhereAreRefused) {
  pack_on_device();
  const std::vector<std::int32_t> host(kSequences + 1);
  jit::CUdeviceptr other = 0;
  {
    const jit::ContextGuard context(1);
    jit::check(jit::driver().cuMemAlloc(&other, 1 << 10), "cuMemAlloc");
  }
  const auto expect_refused = [&](const std::string& argument, const std::string& got) {
    try {
      run();
      ADD_FAILURE() << "no error";
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(error.argument(), argument);
      EXPECT_NE(std::string(error.what()).find(got), std::string::npos) << error.what();
    }
    EXPECT_TRUE(fake.launches.empty());
  };
  in.cumulative_queries = host;
  expect_refused("cumulative_queries", "memory of the host");
  pack_on_device();
  // NOLINTNEXTLINE(performance-no-int-to-ptr): the driver's addresses are integers
  in.cumulative_keys = {reinterpret_cast<const std::int32_t*>(other), kSequences + 1};
  expect_refused("cumulative_keys", "memory of device 1");
  pack_on_device();
  in.cumulative_keys = {at(0), kSequences};
  expect_refused("cumulative_keys", "5 values; allowed: 6");
  in.cumulative_keys = {};
  expect_refused("cumulative_keys", "0 values; allowed: 6");
  const jit::ContextGuard context(1);
  jit::driver().cuMemFree(other);
}

}  // namespace
}  // namespace vicus
