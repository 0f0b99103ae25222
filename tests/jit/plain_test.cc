// Calls of plain kernels, on a driver that only keeps a record: which kernels are launched, on what grids, with
// what arguments.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numbers>
#include <string>
#include <vector>

#include "device_tensor.h"
#include "fake_cuda.h"
#include "gpu/merge_args.h"
#include "gpu/plain_args.h"
#include "gpu/unfused_args.h"
#include "vicus/vicus.hpp"

namespace vicus {
namespace {

using vicus::testing::fake_cuda;
using vicus::testing::FakeCuda;
using vicus::testing::FakeLaunch;
using vicus::testing::Tensor;

constexpr GpuTarget kH100 = {9, 0, 132, 232448};

int stream = 0;  // any address

template <class Args>
Args args_of(const FakeLaunch& launch) {
  Args args;
  std::memcpy(static_cast<void*>(&args), launch.args.data(), sizeof(args));
  return args;
}

class PlainCalls : public ::testing::Test {  // NOLINT(cppcoreguidelines-virtual-class-destructor): GoogleTest's way
 protected:
  ~PlainCalls() override { record<char[FakeCuda::kArgBytes]>(); }

  /// Launches from now on, with their arguments.
  template <class Args>
  void record() {
    const std::lock_guard lock(fake.mutex);
    fake.recorded_bytes = sizeof(Args);
    fake.launches.clear();
    fake.events.clear();
  }
  std::vector<FakeLaunch> launches() {
    const std::lock_guard lock(fake.mutex);
    return fake.launches;
  }
  std::vector<std::string> names() {
    std::vector<std::string> list;
    for (const FakeLaunch& launch : launches()) list.push_back(launch.kernel);
    return list;
  }

  FakeCuda& fake = fake_cuda();
};

Problem dense(DType dtype, std::int64_t batch, std::int64_t queries, std::int64_t keys, std::int64_t head_dim) {
  Problem p;
  p.dtype = dtype;
  p.batch = batch;
  p.layout = queries;
  p.heads = 4;
  p.heads_kv = 2;
  p.head_dim = head_dim;
  p.mask = Dense{.keys = keys};
  return validate(p);
}

Plan plan_of(const Problem& problem) { return choose_plan(problem, {.engine = Engine::sm80, .gpu = kH100}); }

DType sums(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void expect_grid(const FakeLaunch& launch, std::int64_t x, std::int64_t y, unsigned threads) {
  EXPECT_EQ(launch.grid[0], static_cast<unsigned>(x)) << launch.kernel;
  EXPECT_EQ(launch.grid[1], static_cast<unsigned>(y)) << launch.kernel;
  EXPECT_EQ(launch.grid[2], 1U);
  EXPECT_EQ(launch.threads, threads) << launch.kernel;
  EXPECT_EQ(launch.stream, &stream);
}

struct Data {
  explicit Data(const Problem& p)
      : query(p.dtype, p.query_shape()),
        key(p.dtype, p.key_shape()),
        value(p.dtype, p.value_shape()),
        output(p.dtype, p.output_shape()),
        logsumexp(sums(p.dtype), p.logsumexp_shape()),
        extra_keys(p.dtype, p.additional_keys_shape()),
        extra_values(p.dtype, p.additional_values_shape()),
        rpb(p.dtype, p.rpb ? p.rpb_shape() : std::vector<std::int64_t>{1}) {
    inputs = {.query = query.view, .key = key.view, .value = value.view};
    if (p.additional_tokens > 0) {
      inputs.additional_keys = extra_keys.view;
      inputs.additional_values = extra_values.view;
    }
    if (p.rpb) inputs.rpb = rpb.view;
  }
  Tensor query, key, value, output, logsumexp, extra_keys, extra_values, rpb;
  AttentionInputs inputs;
};

TEST_F(PlainCalls, Float32IsComputedInItsOwnPrecision) {
  const Problem p = dense(DType::float32, 3, 1000, 777, 64);
  const Plan plan = plan_of(p);
  EXPECT_EQ(plan.gpu.forward.family, GpuKernels::plain);
  EXPECT_EQ(plan.gpu.backward.keys.family, GpuKernels::plain);
  EXPECT_NE(plan.gpu.reason.find("float32 is computed in its own precision"), std::string::npos) << plan.gpu.reason;
  EXPECT_NE(describe(plan).find("forward  plain, query tile"), std::string::npos) << describe(plan);
  const Data data(p);
  record<gpu::PlainForwardArgs>();
  forward(plan, data.inputs, data.output.view, data.logsumexp.view, &stream);
  ASSERT_EQ(names(), std::vector<std::string>{"plain_forward"});
  const FakeLaunch launch = launches()[0];
  const QueryTile& tile = plan.gpu.forward.tile;
  expect_grid(launch, ceil_div(1000, tile.extent[2]) * 2 * ceil_div(2, tile.heads) * 3, 1,
              32U * static_cast<unsigned>(plan.gpu.forward.warps));
  EXPECT_EQ(launch.shared, static_cast<unsigned>(plan.gpu.forward.shared_bytes));
  const auto args = args_of<gpu::PlainForwardArgs>(launch);
  EXPECT_EQ(args.scale_log2, 0.125 * std::numbers::log2e);
  EXPECT_EQ(args.forward.query.data, data.query.view.data());
  EXPECT_EQ(args.forward.query.batch, 1000 * 4 * 64);
  EXPECT_EQ(args.forward.query.token[2], 4 * 64);
  EXPECT_EQ(args.forward.key.token[2], 2 * 64);
  EXPECT_EQ(args.forward.logsumexp.data, data.logsumexp.view.data());
  EXPECT_EQ(args.forward.logsumexp.token[2], 4);
  EXPECT_EQ(args.forward.len[2], 1000);
  EXPECT_EQ(args.forward.keys, 777);
  EXPECT_EQ(args.forward.heads, 4);
  EXPECT_EQ(args.forward.heads_kv, 2);
  EXPECT_EQ(args.forward.work.tiles[2], ceil_div(1000, tile.extent[2]));
}

TEST_F(PlainCalls, LongHeadDimsAreCutIntoSlices) {
  Problem p = dense(DType::bfloat16, 1, 100, 100, 300);
  p.head_dim_v = 512;
  std::string logged;
  set_log_sink([&](LogLevel, std::string_view text) { logged += text; });
  const Plan plan = plan_of(p);
  set_log_sink({});
  EXPECT_NE(logged.find("head_dim_v up to 256, they are 300 and 512"), std::string::npos) << logged;
  EXPECT_EQ(plan.gpu.backward.scratch_bytes, std::size_t{100 * 4 * 4});
  const Data data(p);
  record<gpu::PlainForwardArgs>();
  forward(plan, data.inputs, data.output.view, {}, &stream);
  EXPECT_EQ(launches().at(0).grid[1], static_cast<unsigned>(ceil_div(512, plan.gpu.forward.wide)));
  EXPECT_GT(launches()[0].grid[1], 1U);
}

TEST_F(PlainCalls, TensorCoresWithoutATileForGradientsLeaveThemToThePlainKernels) {
  const Problem p = dense(DType::float16, 1, 100, 100, 256);
  const Plan small = choose_plan(p, {.engine = Engine::sm80, .gpu = {8, 9, 58, 101376}});
  EXPECT_EQ(small.gpu.forward.family, GpuKernels::tensor_cores);
  EXPECT_EQ(small.gpu.backward.keys.family, GpuKernels::plain);
  EXPECT_NE(small.gpu.reason.find("101376 bytes of shared memory"), std::string::npos) << small.gpu.reason;
  EXPECT_EQ(plan_of(p).gpu.reason, "");
}

TEST_F(PlainCalls, GradientsOfEverything) {
  Problem p;
  p.dtype = DType::float64;
  p.batch = 2;
  p.layout = {20, 21};
  p.heads = 6;
  p.heads_kv = 3;
  p.head_dim = 40;
  p.head_dim_v = 24;
  p.additional_tokens = 70;
  p.rpb = true;
  p.mask = Neighborhood{.kernel_size = {5, 7}, .dilation = {2, 1}};
  p = validate(p);
  const Plan plan = plan_of(p);
  const Data data(p), gradients(p);
  record<gpu::PlainBackwardArgs>();
  const AttentionGradients wanted = {gradients.query.view,      gradients.key.view,          gradients.value.view,
                                     gradients.extra_keys.view, gradients.extra_values.view, gradients.rpb.view};
  backward(plan, data.inputs,
           {.output = data.output.view, .logsumexp = data.logsumexp.view, .grad_output = gradients.output.view}, wanted,
           &stream);
  const std::vector<FakeLaunch> all = launches();
  ASSERT_EQ(names(), (std::vector<std::string>{"plain_delta", "plain_backward_queries", "plain_backward_keys",
                                               "plain_backward_additional", "plain_backward_bias"}));
  const GpuKernelPlan &queries = plan.gpu.backward.queries, &keys = plan.gpu.backward.keys;
  const auto tiles = [](const std::array<int, 3>& extent) { return ceil_div(10, extent[1]) * ceil_div(21, extent[2]); };
  expect_grid(all[0], ceil_div(20 * 21 * 6, 32), 2, 256);
  expect_grid(all[1], tiles(queries.tile.extent) * 3 * ceil_div(2, queries.tile.heads) * 4, 1, 128);
  expect_grid(all[2], tiles(keys.kv_tile) * 3 * 4, 1, 128);
  expect_grid(all[3], ceil_div(70, keys.kv_tile[1] * keys.kv_tile[2]) * 3 * 2, 1, 128);
  expect_grid(all[4], 6 * 9 * 13, 1, 256);
  EXPECT_EQ(fake.events.at(0), "allocate " + std::to_string(2 * 20 * 21 * 6 * 8));
  const auto args = args_of<gpu::PlainBackwardArgs>(all[2]);
  EXPECT_EQ(args.batch, 2);
  EXPECT_EQ(args.cells, 4) << "two residue classes of two entries";
  EXPECT_EQ(args.forward.work.classes[1], 2);
  EXPECT_EQ(args.key_work.classes[1], 2);
  EXPECT_EQ(args.scale, p.effective_scale());
  EXPECT_EQ(args.scale_log2, p.effective_scale() * std::numbers::log2e);
  EXPECT_EQ(args.grad_key.data, gradients.key.view.data());
  EXPECT_EQ(args.grad_additional_values.data, gradients.extra_values.view.data());
  EXPECT_EQ(args.grad_logsumexp.data, nullptr);
  EXPECT_EQ(args.grad_bias.axis[1], 13);
  EXPECT_EQ(args.delta.token[1], 21 * 6);
}

TEST_F(PlainCalls, GridsStayWithinTheDriversLimits) {
  Problem p = dense(DType::float32, 70000, 1, 1, 8);
  const Plan plan = plan_of(p);
  const Data data(p);
  const Tensor gradient(p.dtype, p.query_shape());
  record<gpu::PlainBackwardArgs>();
  backward(plan, data.inputs,
           {.output = data.output.view, .logsumexp = data.logsumexp.view, .grad_output = data.output.view},
           {.query = gradient.view}, &stream);
  EXPECT_EQ(launches().at(0).grid[1], 65535U);
  EXPECT_EQ(args_of<gpu::PlainBackwardArgs>(launches()[0]).batch, 70000);
}

TEST_F(PlainCalls, WhatNoKernelTakes) {
  const std::string text = supports(dense(DType::float32, 1, 4, 4, 513), Engine::sm80);
  EXPECT_NE(text.find("up to 512, they are 513 and 513"), std::string::npos) << text;
  EXPECT_EQ(supports(dense(DType::float64, 1, 4, 4, 512), Engine::sm80), "");
  EXPECT_THROW((void)choose_plan(dense(DType::float32, 1, 4, 4, 64), {.engine = Engine::sm80, .gpu = {9, 0, 1, 1000}}),
               Unsupported);
}

TEST_F(PlainCalls, UnfusedOperators) {
  const Neighborhood mask = {.kernel_size = {3, 5}, .stride = 1, .dilation = {1, 2}, .is_causal = 0};
  constexpr auto kType = DType::float32;
  const Tensor query(kType, {2, 4, 9, 10, 16}), key(kType, {2, 2, 9, 10, 16}), extra(kType, {2, 2, 3, 16});
  const Tensor scores(kType, {2, 4, 9, 10, 18}), bias(DType::float64, {4, 5, 9});
  const Tensor grad_query(kType, {2, 4, 9, 10, 16}), grad_key(kType, {2, 2, 9, 10, 16}),
      grad_extra(kType, {2, 2, 3, 16});
  record<gpu::UnfusedArgs>();
  qk_forward(mask, query.view, key.view, scores.view, extra.view, bias.view, Engine::sm80, &stream);
  qk_backward(mask, query.view, key.view, scores.view, {grad_query.view, grad_key.view, grad_extra.view, bias.view},
              extra.view, Engine::sm80, &stream);
  av_forward(mask, scores.view, key.view, grad_query.view, extra.view, Engine::sm80, &stream);
  const Tensor grad_scores(kType, {2, 4, 9, 10, 18});
  av_backward(mask, scores.view, key.view, query.view, {.scores = grad_scores.view}, extra.view, Engine::sm80, &stream);
  const std::vector<FakeLaunch> all = launches();
  ASSERT_EQ(names(), (std::vector<std::string>{"unfused_scores", "unfused_to_queries", "unfused_to_keys",
                                               "unfused_to_additional", "unfused_to_bias", "unfused_to_queries",
                                               "unfused_scores"}));
  expect_grid(all[0], ceil_div(90, 8), 8, 256);
  expect_grid(all[2], ceil_div(90, 8), 4, 256);
  expect_grid(all[3], 2 * 2 * 3, 1, 256);
  expect_grid(all[4], 4 * 5 * 9, 1, 256);
  const auto forward_args = args_of<gpu::UnfusedArgs>(all[0]), back = args_of<gpu::UnfusedArgs>(all[6]);
  EXPECT_FALSE(forward_args.zero_unused);
  EXPECT_TRUE(back.zero_unused);
  EXPECT_EQ(back.bias.data, nullptr);
  EXPECT_EQ(back.scores.data, grad_scores.view.data());
  EXPECT_EQ(forward_args.bias.data, bias.view.data());
  EXPECT_EQ(forward_args.rows.head, 9 * 10 * 16) << "heads first";
  EXPECT_EQ(forward_args.rows.token[1], 10 * 16);
  EXPECT_EQ(forward_args.rows.token[2], 16);
  EXPECT_EQ(forward_args.additional.token[2], 16);
  EXPECT_EQ(forward_args.additional.head, 3 * 16);
  EXPECT_EQ(forward_args.tokens, 3);
  EXPECT_EQ(forward_args.len[1], 9);
  EXPECT_EQ(args_of<gpu::UnfusedArgs>(all[3]).additional.data, grad_extra.view.data());
}

TEST_F(PlainCalls, UnfusedOperatorsOnTensorCoresHaveAWarpForSixteenPositions) {
  const Neighborhood mask = {.kernel_size = {3, 5}, .stride = 1, .dilation = {1, 2}, .is_causal = 0};
  for (const std::int64_t width : {16, 20}) {  // rows of the second have no multiple of 16 bytes
    const Tensor query(DType::bfloat16, {2, 4, 9, 10, width}), key(DType::bfloat16, {2, 2, 9, 10, width});
    const Tensor scores(DType::bfloat16, {2, 4, 9, 10, 15}), grad_query(DType::bfloat16, {2, 4, 9, 10, width}),
        grad_key(DType::bfloat16, {2, 2, 9, 10, width});
    record<gpu::UnfusedArgs>();
    qk_forward(mask, query.view, key.view, scores.view, {}, {}, Engine::sm80, &stream);
    qk_backward(mask, query.view, key.view, scores.view, {grad_query.view, grad_key.view, {}, {}}, {}, Engine::sm80,
                &stream);
    const std::vector<FakeLaunch> all = launches();
    if (width == 20) {
      EXPECT_EQ(names(), (std::vector<std::string>{"unfused_scores", "unfused_to_queries", "unfused_to_keys"}));
      continue;
    }
    ASSERT_EQ(names(), (std::vector<std::string>{"unfused_tile_scores", "unfused_tile_sums", "unfused_tile_sums"}));
    // Two residue classes of 9 x 5 positions, in boxes of 4 x 4: six each, four to a block.
    expect_grid(all[0], 2 * 6 / 4, 8, 128);
    expect_grid(all[1], 2 * 6 / 4, 8, 128);
    expect_grid(all[2], 2 * 6 / 4, 4, 128);
    EXPECT_EQ(args_of<gpu::UnfusedArgs>(all[1]).rows.data, grad_query.view.data());
    EXPECT_EQ(args_of<gpu::UnfusedArgs>(all[2]).keys.data, grad_key.view.data());
  }
}

TEST_F(PlainCalls, UnfusedOperatorsDuringACaptureQueueAllKernelsOrNone) {
  constexpr auto kType = DType::float64;
  const Neighborhood mask = {.kernel_size = 7};
  const Tensor query(kType, {2, 4, 31, 24}), grad(kType, {2, 4, 31, 24}), scores(kType, {2, 4, 31, 7});
  av_forward(mask, scores.view, query.view, grad.view, {}, Engine::sm80, &stream);  // the kernel of grad_query
  record<gpu::UnfusedArgs>();
  fake.capture_status = 1;
  EXPECT_THROW(
      qk_backward(mask, query.view, query.view, scores.view, {grad.view, grad.view, {}, {}}, {}, Engine::sm80, &stream),
      Unsupported);
  EXPECT_EQ(launches().size(), 0U);
  qk_backward(mask, query.view, query.view, scores.view, {grad.view, {}, {}, {}}, {}, Engine::sm80, &stream);
  EXPECT_EQ(launches().size(), 1U);
  fake.capture_status = 0;
}

TEST_F(PlainCalls, UnfusedOperatorsOfNothingLaunchNothingAndOtherEnginesAreRefused) {
  const Tensor none(DType::float32, {0, 2, 9, 16}), scores(DType::float32, {0, 2, 9, 3});
  record<gpu::UnfusedArgs>();
  qk_forward({.kernel_size = 3}, none.view, none.view, scores.view, {}, {}, Engine::sm80, &stream);
  EXPECT_EQ(launches().size(), 0U);
  try {
    qk_forward({.kernel_size = 3}, none.view, none.view, scores.view, {}, {}, Engine::reference);
    ADD_FAILURE();
  } catch (const Unsupported& error) {
    EXPECT_STREQ(error.what(), "engine reference has no unfused operators; cpu and sm80 have");
  }
}

class MergeCalls : public PlainCalls {
 protected:
  explicit MergeCalls(int parts = 40) {
    for (int i = 0; i < parts; ++i) {
      outputs.emplace_back(tensor(DType::float16, {2, 33, 3, 64}));
      logsumexps.emplace_back(tensor(DType::float32, {2, 33, 3}));
    }
  }
  TensorView tensor(DType dtype, const std::vector<std::int64_t>& shape) {
    kept.push_back(std::make_unique<Tensor>(dtype, shape));
    return kept.back()->view;
  }
  std::vector<std::unique_ptr<Tensor>> kept;
  std::vector<ConstTensorView> outputs, logsumexps;
};

TEST_F(MergeCalls, MoreThanSixteenPartsAreMergedInRounds) {
  const TensorView output = tensor(DType::float16, {2, 33, 3, 64}), logsumexp = tensor(DType::float32, {2, 33, 3});
  record<gpu::MergeArgs>();
  merge_forward(outputs, logsumexps, output, logsumexp, Engine::sm80, &stream);
  const std::vector<FakeLaunch> all = launches();
  ASSERT_EQ(names(), std::vector<std::string>(3, "merge_forward"));
  std::vector<gpu::MergeArgs> args;
  for (const FakeLaunch& launch : all) {
    expect_grid(launch, ceil_div(33 * 3, 256 / 8), 2, 256);
    args.push_back(args_of<gpu::MergeArgs>(launch));
  }
  EXPECT_EQ(args[0].parts, 16);
  EXPECT_EQ(args[1].parts, 16) << "fifteen more and what is merged";
  EXPECT_EQ(args[2].parts, 10);
  EXPECT_EQ(args[1].outputs[0].data, outputs[16].data());
  EXPECT_EQ(args[1].outputs[15].data, args[0].output.data);
  EXPECT_EQ(args[1].logsumexps[15].data, args[0].logsumexp.data);
  EXPECT_EQ(args[2].outputs[9].data, args[1].output.data);
  EXPECT_NE(args[1].output.data, args[0].output.data) << "it is read by that round";
  EXPECT_EQ(args[2].output.data, output.data());
  EXPECT_EQ(args[2].logsumexp.data, logsumexp.data());
  EXPECT_EQ(args[0].heads, 3);
  EXPECT_EQ(args[0].len[2], 33);
  EXPECT_EQ(args[0].logsumexps[0].token[2], 3);
}

TEST_F(MergeCalls, GradientsDuringACaptureQueueAllKernelsOrNone) {
  for (auto* list : {&outputs, &logsumexps}) {
    for (ConstTensorView& part : *list) {
      const bool rows = list == &outputs;
      part =
          tensor(DType::float32, rows ? std::vector<std::int64_t>{2, 33, 3, 48} : std::vector<std::int64_t>{2, 33, 3});
    }
  }
  const TensorView grad = tensor(DType::float32, {2, 33, 3, 48});
  const auto backward = [&](std::size_t parts) {
    const std::vector<TensorView> grads(parts, grad);
    merge_backward(std::span(outputs).first(parts), std::span(logsumexps).first(parts), grad, {}, grads, {},
                   Engine::sm80, &stream);
  };
  backward(2);  // without the kernel of the sums of many parts
  record<gpu::MergeArgs>();
  fake.capture_status = 1;
  EXPECT_THROW(backward(40), Unsupported);
  EXPECT_EQ(launches().size(), 0U);
  fake.capture_status = 0;
}

TEST_F(MergeCalls, GradientsOfManyPartsNeedTheSumsOfAll) {
  const TensorView grad = tensor(DType::float16, {2, 33, 3, 64});
  std::vector<TensorView> grads(outputs.size());
  grads[20] = tensor(DType::float16, {2, 33, 3, 64});
  record<gpu::MergeArgs>();
  merge_backward(outputs, logsumexps, grad, {}, grads, {}, Engine::sm80, &stream);
  ASSERT_EQ(names(), (std::vector<std::string>{"merge_sums", "merge_sums", "merge_sums", "merge_backward",
                                               "merge_backward", "merge_backward"}));
  EXPECT_EQ(fake.events.at(0), "allocate " + std::to_string(3 * 2 * 33 * 3 * 4));
  std::vector<gpu::MergeArgs> args;
  for (const FakeLaunch& launch : launches()) args.push_back(args_of<gpu::MergeArgs>(launch));
  EXPECT_TRUE(args[0].first);
  EXPECT_FALSE(args[1].first);
  EXPECT_EQ(args[2].parts, 8);
  for (const auto& each : args) EXPECT_EQ(each.sums, args[0].sums);
  EXPECT_EQ(args[4].grad_outputs[4].data, grads[20].data());
  EXPECT_EQ(args[4].grad_outputs[5].data, nullptr);
  EXPECT_EQ(args[4].grad_logsumexps[4].data, nullptr);
}

TEST_F(MergeCalls, FewPartsNeedNoMemory) {
  const TensorView output = tensor(DType::float16, {2, 33, 3, 64});
  std::vector<TensorView> grads(16);
  grads[0] = tensor(DType::float16, {2, 33, 3, 64});
  record<gpu::MergeArgs>();
  merge_forward(std::span(outputs).first(16), std::span(logsumexps).first(16), output, {}, Engine::sm80, &stream);
  merge_backward(std::span(outputs).first(16), std::span(logsumexps).first(16), output, {}, grads, {}, Engine::sm80,
                 &stream);
  EXPECT_EQ(names(), (std::vector<std::string>{"merge_forward", "merge_backward"}));
  EXPECT_EQ(args_of<gpu::MergeArgs>(launches()[0]).logsumexp.data, nullptr);
  EXPECT_EQ(args_of<gpu::MergeArgs>(launches()[1]).sums, nullptr);
  for (const std::string& event : fake.events) EXPECT_FALSE(event.starts_with("allocate")) << event;
}

}  // namespace
}  // namespace vicus
