// Calls of the GPU engine on a driver that only keeps a record: what they compile, load, allocate and launch, before and
// after `prepare`, and while a stream is captured.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "device_tensor.h"
#include "fake_cuda.h"
#include "jit/device.h"
#include "vicus/vicus.hpp"

namespace vicus {
namespace {

using vicus::testing::fake_cuda;
using vicus::testing::FakeCuda;
using vicus::testing::Tensor;

int stream = 0;  // any address

int compilations() {
  std::ifstream in(std::getenv("FAKE_NVRTC_LOG"));
  int lines = 0;
  for (std::string line; std::getline(in, line);) ++lines;
  return lines;
}

/// All tensors of a problem. `offset` moves their starts, in elements.
struct Data {
  explicit Data(const Problem& p, std::int64_t offset = 0)
      : query(p.dtype, p.query_shape(), offset),
        key(p.dtype, p.key_shape(), offset),
        value(p.dtype, p.value_shape(), offset),
        extra_keys(p.dtype, p.additional_keys_shape(), offset),
        extra_values(p.dtype, p.additional_values_shape(), offset),
        rpb(p.dtype, p.rpb ? p.rpb_shape() : std::vector<std::int64_t>{1}),
        output(p.dtype, p.output_shape(), offset),
        logsumexp(DType::float32, p.logsumexp_shape()),
        grad_query(p.dtype, p.query_shape(), offset),
        grad_key(p.dtype, p.key_shape(), offset),
        grad_value(p.dtype, p.value_shape(), offset),
        grad_extra_keys(p.dtype, p.additional_keys_shape(), offset),
        grad_extra_values(p.dtype, p.additional_values_shape(), offset),
        grad_rpb(p.dtype, p.rpb ? p.rpb_shape() : std::vector<std::int64_t>{1}),
        grad_output(p.dtype, p.output_shape(), offset) {
    inputs = {.query = query.view, .key = key.view, .value = value.view};
    wanted = {.query = grad_query.view, .key = grad_key.view, .value = grad_value.view};
    if (p.additional_tokens > 0) {
      inputs.additional_keys = extra_keys.view;
      inputs.additional_values = extra_values.view;
      wanted.additional_keys = grad_extra_keys.view;
      wanted.additional_values = grad_extra_values.view;
    }
    if (p.rpb) {
      inputs.rpb = rpb.view;
      wanted.rpb = grad_rpb.view;
    }
    arrived = {.output = output.view, .logsumexp = logsumexp.view, .grad_output = grad_output.view};
  }

  Tensor query, key, value, extra_keys, extra_values, rpb, output, logsumexp;
  Tensor grad_query, grad_key, grad_value, grad_extra_keys, grad_extra_values, grad_rpb, grad_output;
  AttentionInputs inputs;
  AttentionGradInputs arrived;
  AttentionGradients wanted;
};

class GpuCalls : public ::testing::Test {
 protected:
  GpuCalls() {
    forget();
    fake.capture_status = 0;
    problem.dtype = DType::bfloat16;
    problem.layout = {40, 16 + ++run};  // kernels do not depend on it, tiles may
    problem.heads = 2;
    problem.head_dim = 8 * run;  // kernels that no test before had
    problem.mask = Neighborhood{.kernel_size = 7};
    problem = validate(problem);
  }
  void TearDown() override { fake.capture_status = 0; }

  void forget() {
    const std::lock_guard lock(fake.mutex);
    fake.failing_call.clear();
    fake.events.clear();
  }
  std::vector<std::string> events() {
    const std::lock_guard lock(fake.mutex);
    return fake.events;
  }
  [[nodiscard]] Plan plan(bool deterministic = false, int device = 0) const {
    const jit::ContextGuard context(device);
    return choose_plan(problem, {.engine = Engine::sm80, .backward = {.deterministic = deterministic}});
  }
  /// The error of a call during a capture, which must have done nothing.
  template <class Call>
  std::string refused(const Call& call) {
    const int loads = fake.loads, compiled = compilations();
    forget();
    fake.capture_status = 1;
    std::string text;
    try {
      call();
      ADD_FAILURE() << "no error";
    } catch (const Unsupported& error) {
      text = error.what();
    }
    EXPECT_EQ(events(), std::vector<std::string>{});
    EXPECT_EQ(fake.loads, loads);
    EXPECT_EQ(compilations(), compiled);
    fake.capture_status = 0;
    return text;
  }

  static inline int run = 0;
  FakeCuda& fake = fake_cuda();
  Problem problem;
};

TEST_F(GpuCalls, WhatIsPreparedIsOnlyLookedUp) {
  const Plan p = plan();
  const Data data(problem);
  const int before = fake.loads;
  prepare(p, {.backward = false, .logsumexp = true});
  EXPECT_EQ(fake.loads - before, 1);
  prepare(p, {.backward = false});
  EXPECT_EQ(fake.loads - before, 2) << "with and without logsumexp";
  const int loads = fake.loads, compiled = compilations();
  forget();
  forward(p, data.inputs, data.output.view, data.logsumexp.view, &stream);
  forward(p, data.inputs, data.output.view, {}, &stream);
  prepare(p, {.backward = false});
  EXPECT_EQ(fake.loads, loads);
  EXPECT_EQ(compilations(), compiled);
  const std::string launch = "launch forward " + std::to_string(32 * p.gpu.forward.warps);
  EXPECT_EQ(events(), (std::vector{launch, launch}));
}

TEST_F(GpuCalls, EveryCallLaunchesOnlyWhatItsPlanListed) {
  problem.additional_tokens = 3;
  problem.rpb = true;
  const Data data(problem);
  for (const bool deterministic : {false, true}) {
    const Plan p = plan(deterministic);
    prepare(p);
    const int loads = fake.loads, compiled = compilations();
    for (int wanted = 0; wanted < 16; ++wanted) {
      AttentionGradients gradients;
      if ((wanted & 1) != 0) gradients.query = data.wanted.query;
      if ((wanted & 2) != 0) gradients.value = data.wanted.value;
      if ((wanted & 4) != 0) gradients.additional_keys = data.wanted.additional_keys;
      if ((wanted & 8) != 0) gradients.rpb = data.wanted.rpb;
      fake.capture_status = 1;  // nothing may be compiled now
      forget();
      backward(p, data.inputs, data.arrived, gradients, &stream);
      fake.capture_status = 0;
      const std::vector<std::string> seen = events();
      EXPECT_TRUE(seen.front().starts_with("allocate")) << "stream-ordered, which a graph may hold";
      EXPECT_EQ(seen.back(), "free");
      EXPECT_EQ(seen[1].starts_with("clear"), !deterministic);
      const auto launched = [&](const std::string& name) {
        return std::any_of(seen.begin(), seen.end(), [&](const auto& e) { return e.starts_with("launch " + name); });
      };
      EXPECT_TRUE(launched("delta"));
      EXPECT_EQ(launched("backward_queries"), deterministic && (wanted & 1) != 0);
      EXPECT_EQ(launched("convert"), !deterministic && (wanted & 1) != 0);
      EXPECT_EQ(launched("backward_keys"), (wanted & (deterministic ? 6 : 7)) != 0);
      EXPECT_EQ(launched("backward_bias"), (wanted & 8) != 0);
    }
    EXPECT_EQ(fake.loads, loads);
    EXPECT_EQ(compilations(), compiled);
  }
}

TEST_F(GpuCalls, ScratchIsOfOnePoolOfEachDeviceThatKeepsIt) {
  for (const int device : {0, 1, 0}) {
    const jit::ContextGuard context(device);
    prepare(plan(true, device));
    const auto pool_of = [](const auto& p) { return p.device; };
    const std::lock_guard lock(fake.mutex);
    EXPECT_EQ(std::ranges::count(fake.pools, device, pool_of), 1);
    for (const auto& pool : fake.pools) EXPECT_EQ(pool.kept, std::uint64_t{1} << 30);
  }
}

TEST_F(GpuCalls, SoDoThoseWithFewGradientsOfSmallWindows) {
  problem.layout = {56, 56};
  problem.head_dim = problem.head_dim_v = 64;
  const Data data(problem);
  const Plan p = plan(true);
  ASSERT_GT(p.gpu.backward.queries.warp_tile[0], 0) << "warps meet parts";
  prepare(p);
  for (const bool query : {true, false}) {
    AttentionGradients gradients;
    (query ? gradients.query : gradients.key) = query ? data.wanted.query : data.wanted.key;
    fake.capture_status = 1;  // nothing may be compiled now
    forget();
    backward(p, data.inputs, data.arrived, gradients, &stream);
    fake.capture_status = 0;
    const std::vector<std::string> seen = events();
    const auto launched = [&](const std::string& name) {
      return std::any_of(seen.begin(), seen.end(), [&](const auto& e) { return e.starts_with("launch " + name); });
    };
    EXPECT_EQ(launched("delta"), !query) << "the kernel for queries makes statistics, too";
    EXPECT_EQ(launched("backward_queries"), query);
    EXPECT_EQ(launched("backward_keys"), !query);
  }
}

TEST_F(GpuCalls, ACaptureIsRefusedBeforeAnythingIsQueued) {
  const Plan p = plan();
  const Data data(problem);
  const auto call = [&] { forward(p, data.inputs, data.output.view, data.logsumexp.view, &stream); };
  const std::string text = refused(call);
  for (const char* const part : {"CUDA graph", "vicus::prepare", "vicus.warmup"}) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }
  prepare(p, {.backward = false});
  fake.capture_status = 1;
  call();
  const auto back = [&] { backward(p, data.inputs, data.arrived, data.wanted, &stream); };
  refused(back);
  prepare(p, {.forward = false});
  fake.capture_status = 1;
  back();
}

TEST_F(GpuCalls, TheLastKernelMissingIsAsBadAsTheFirst) {
  problem.rpb = true;
  const Plan p = plan(true);
  const Data data(problem);
  AttentionGradients without = data.wanted;
  without.rpb = {};
  backward(p, data.inputs, data.arrived, without, &stream);
  refused([&] { backward(p, data.inputs, data.arrived, data.wanted, &stream); });
}

TEST_F(GpuCalls, UnalignedTensorsHaveKernelsOfTheirOwn) {
  const Plan p = plan();
  const Data data(problem, 1);
  prepare(p);
  const auto call = [&] { forward(p, data.inputs, data.output.view, {}, &stream); };
  refused(call);
  prepare(p, {.aligned = false});
  const int loads = fake.loads;
  fake.capture_status = 1;
  call();
  backward(p, data.inputs, data.arrived, data.wanted, &stream);
  fake.capture_status = 0;
  prepare(p, {.aligned = {}});
  EXPECT_EQ(fake.loads, loads);
}

TEST_F(GpuCalls, HeadDimsThatAreNeverAlignedArePreparedAsTheyAre) {
  problem.head_dim = problem.head_dim_v = 8 * run + 3;
  const Plan p = plan();
  const Data data(problem);
  prepare(p, {.aligned = true});
  fake.capture_status = 1;
  forward(p, data.inputs, data.output.view, {}, &stream);
  backward(p, data.inputs, data.arrived, data.wanted, &stream);
}

TEST_F(GpuCalls, PreparingIsPossibleDuringACaptureAndOnTheDeviceOfThePlanOnly) {
  const Plan p = plan(false, 1);  // sm_90
  fake.capture_status = 1;
  const int loads = fake.loads;
  prepare(p, {.backward = false}, 1);
  EXPECT_EQ(fake.loads - loads, 2);
  try {
    prepare(p);
    ADD_FAILURE();
  } catch (const InvalidArgument& error) {
    EXPECT_EQ(error.argument(), "device");
    EXPECT_NE(std::string(error.what()).find("sm_90"), std::string::npos);
  }
  EXPECT_THROW(prepare(p, {}, 2), InvalidArgument);
}

TEST_F(GpuCalls, Float64WantsALogsumexpOfItsType) {
  problem.dtype = DType::float64;
  const Plan p = plan();
  const Data data(problem);  // with a float32 one
  forget();
  for (const auto& call : {std::function([&] { forward(p, data.inputs, data.output.view, data.logsumexp.view); }),
                           std::function([&] { backward(p, data.inputs, data.arrived, data.wanted); })}) {
    try {
      call();
      ADD_FAILURE() << "no error";
    } catch (const Unsupported& error) {
      EXPECT_NE(std::string(error.what()).find("float64 logsumexp"), std::string::npos) << error.what();
    }
  }
  EXPECT_EQ(events(), std::vector<std::string>{});
}

TEST_F(GpuCalls, WithoutQueriesTheGradientsOfKeysAreStillWritten) {
  for (const DType dtype : {DType::bfloat16, DType::float32}) {
    problem.dtype = dtype;
    problem.layout = 0;
    problem.mask = Dense{.keys = 5};
    const Plan p = plan();
    Data data(p.problem);
    for (ConstTensorView* const empty : {&data.inputs.query, &data.arrived.output, &data.arrived.grad_output}) {
      *empty = ConstTensorView(nullptr, dtype, *empty);  // as PyTorch has it
    }
    data.wanted.query = TensorView(nullptr, dtype, data.wanted.query);
    forget();
    backward(p, data.inputs, data.arrived, data.wanted, &stream);
    const std::vector<std::string> seen = events();
    EXPECT_TRUE(std::any_of(seen.begin(), seen.end(), [](const std::string& e) {
      return e.starts_with("launch ") && e.find("backward_keys") != std::string::npos;
    }));
  }
}

TEST_F(GpuCalls, OtherEnginesNeedNoPreparation) {
  const int loads = fake.loads;
  prepare(choose_plan(problem, {.engine = Engine::cpu}));
  EXPECT_EQ(fake.loads, loads);
}

TEST_F(GpuCalls, AnAxisWithoutTokensBesideHugeOnes) {
  problem.layout = {0, 1 << 19, 1 << 19};
  problem.mask = Neighborhood{.kernel_size = 3};
  problem.additional_tokens = 4;
  problem = validate(problem);
  const Data data(problem);
  forget();
  backward(plan(true), data.inputs, data.arrived, data.wanted, &stream);
  const auto launched = events();
  EXPECT_EQ(
      std::count_if(launched.begin(), launched.end(), [](const std::string& e) { return e.starts_with("launch"); }), 1)
      << "zeros for the gradients of additional tokens";
}

}  // namespace
}  // namespace vicus
