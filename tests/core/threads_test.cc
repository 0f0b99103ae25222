// State that calls share: plans used from many threads at once, the logger, the limit on CPU targets.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "testing.h"

namespace vicus {
namespace {

using testing::expect_invalid;
using testing::Tensor;

constexpr int kCallers = 4;

/// Runs `call(i)` for i in 0..kCallers on that many threads, all started before any may go on.
template <class Call>
void from_many_threads(const Call& call) {
  std::atomic<int> waiting{kCallers};
  std::vector<std::thread> threads;
  threads.reserve(kCallers);
  for (int i = 0; i < kCallers; ++i) {
    threads.emplace_back([&, i] {
      --waiting;
      while (waiting > 0) std::this_thread::yield();
      call(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

class SharedPlan : public ::testing::TestWithParam<Engine> {};

TEST_P(SharedPlan, GivesEveryCallerTheSameBits) {
  Problem p = testing::small_neighborhood();
  p.additional_tokens = 2;
  p.rpb = true;
  const Plan plan = choose_plan(p, {.engine = GetParam(), .threads = 2});
  const Problem& v = plan.problem;
  Tensor<float> query(v.query_shape(), 1U), key(v.key_shape(), 2U), value(v.value_shape(), 3U);
  Tensor<float> extra_keys(v.additional_keys_shape(), 4U), extra_values(v.additional_values_shape(), 5U);
  Tensor<float> bias(v.rpb_shape(), 6U), grad_output(v.output_shape(), 7U);
  const AttentionInputs in{.query = query.view(),
                           .key = key.view(),
                           .value = value.view(),
                           .additional_keys = extra_keys.view(),
                           .additional_values = extra_values.view(),
                           .rpb = bias.view()};

  struct Results {
    Tensor<float> output, logsumexp, query, key, value, extra_keys, extra_values, bias;
  };
  const auto fresh = [&] {
    return Results{Tensor<float>(v.output_shape(), 0.F),
                   Tensor<float>(v.logsumexp_shape(), 0.F),
                   Tensor<float>(v.query_shape(), 0.F),
                   Tensor<float>(v.key_shape(), 0.F),
                   Tensor<float>(v.value_shape(), 0.F),
                   Tensor<float>(v.additional_keys_shape(), 0.F),
                   Tensor<float>(v.additional_values_shape(), 0.F),
                   Tensor<float>(v.rpb_shape(), 0.F)};
  };
  const auto compute = [&](Results& r) {
    forward(plan, in, r.output.view(), r.logsumexp.view());
    AttentionGradInputs grad_in;
    grad_in.output = r.output.view();
    grad_in.logsumexp = r.logsumexp.view();
    grad_in.grad_output = grad_output.view();
    backward(plan, in, grad_in,
             {.query = r.query.view(),
              .key = r.key.view(),
              .value = r.value.view(),
              .additional_keys = r.extra_keys.view(),
              .additional_values = r.extra_values.view(),
              .rpb = r.bias.view()});
  };

  Results alone = fresh();
  compute(alone);
  std::vector<Results> together;
  together.reserve(kCallers);
  for (int i = 0; i < kCallers; ++i) together.push_back(fresh());
  from_many_threads([&](int i) { compute(together[static_cast<std::size_t>(i)]); });
  for (Results& r : together) {
    EXPECT_EQ(r.output.data, alone.output.data);
    EXPECT_EQ(r.logsumexp.data, alone.logsumexp.data);
    EXPECT_EQ(r.query.data, alone.query.data);
    EXPECT_EQ(r.key.data, alone.key.data);
    EXPECT_EQ(r.value.data, alone.value.data);
    EXPECT_EQ(r.extra_keys.data, alone.extra_keys.data);
    EXPECT_EQ(r.extra_values.data, alone.extra_values.data);
    EXPECT_EQ(r.bias.data, alone.bias.data);
  }
}

TEST_P(SharedPlan, PlansAreMadeFromManyThreads) {
  const Plan alone = choose_plan(testing::small_neighborhood(), {.engine = GetParam()});
  std::vector<std::string> texts(kCallers);
  from_many_threads([&](int i) {
    texts[static_cast<std::size_t>(i)] = describe(choose_plan(testing::small_neighborhood(), {.engine = GetParam()}));
  });
  for (const std::string& text : texts) EXPECT_EQ(text, describe(alone));
}

INSTANTIATE_TEST_SUITE_P(Engines, SharedPlan, ::testing::Values(Engine::reference, Engine::cpu),
                         [](const auto& test) { return std::string(engine_name(test.param)); });

/// Something that the library reports at debug level: one plan and one call.
void do_something() {
  Problem p = testing::small_neighborhood();
  const Plan plan = choose_plan(p);
  const Problem& v = plan.problem;
  Tensor<float> query(v.query_shape(), 1U), key(v.key_shape(), 2U), value(v.value_shape(), 3U),
      out(v.output_shape(), 0.F);
  forward(plan, {.query = query.view(), .key = key.view(), .value = value.view()}, out.view());
}

class Logging : public ::testing::Test {
 protected:
  void TearDown() override { set_log_sink({}); }
};

TEST_F(Logging, IsOffByDefaultAndPrintsNothing) {
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  do_something();
  EXPECT_EQ(::testing::internal::GetCapturedStdout(), "");
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
}

TEST_F(Logging, TellsASinkAboutPlans) {
  std::vector<std::string> lines;
  set_log_sink([&](LogLevel, std::string_view line) { lines.emplace_back(line); }, LogLevel::debug);
  do_something();
  ASSERT_FALSE(lines.empty());
  for (const std::string& line : lines) {
    EXPECT_FALSE(line.empty());
    EXPECT_NE(line.back(), '\n');
  }
}

TEST_F(Logging, LevelsBelowTheLeastAreNotHeard) {
  int heard = 0;
  set_log_sink([&](LogLevel level, std::string_view) { heard += level < LogLevel::warning; }, LogLevel::warning);
  do_something();
  EXPECT_EQ(heard, 0);
}

TEST_F(Logging, AnEmptySinkSwitchesItOff) {
  int heard = 0;
  set_log_sink([&](LogLevel, std::string_view) { ++heard; }, LogLevel::debug);
  set_log_sink({}, LogLevel::debug);
  do_something();
  EXPECT_EQ(heard, 0);
}

TEST_F(Logging, ASinkIsNeverCalledTwiceAtOnce) {
  // Plain variables: ThreadSanitizer sees a call that is not ordered after the one before it.
  int inside = 0, most = 0, heard = 0;
  set_log_sink(
      [&](LogLevel, std::string_view) {
        most = std::max(most, ++inside);
        std::this_thread::yield();
        ++heard;
        --inside;
      },
      LogLevel::debug);
  from_many_threads([](int) { do_something(); });
  set_log_sink({});
  EXPECT_GE(heard, kCallers);
  EXPECT_EQ(most, 1);
}

TEST_F(Logging, SinksMayBeSetWhileOthersLog) {
  std::atomic<int> heard{0};
  from_many_threads([&](int i) {
    for (int n = 0; n < 20; ++n) {
      if (i == 0) set_log_sink([&](LogLevel, std::string_view) { ++heard; }, LogLevel::debug);
      if (i == 1) set_log_sink({});
      if (i > 1) do_something();
    }
  });
  set_log_sink([&](LogLevel, std::string_view) { ++heard; }, LogLevel::debug);
  heard = 0;
  do_something();
  EXPECT_GT(heard, 0) << "the last sink set is the one that hears";
}

class Targets : public ::testing::Test {
 protected:
  void TearDown() override { limit_cpu_target(""); }
};

TEST_F(Targets, AvailableOnesAreAmongThoseBuiltInTheSameOrder) {
  const std::vector<std::string> built = cpu_targets_built(), available = cpu_targets_available();
  ASSERT_FALSE(available.empty());
  auto from = built.begin();
  for (const std::string& target : available) {
    from = std::find(from, built.end(), target);
    ASSERT_NE(from, built.end()) << target;
    ++from;
  }
}

TEST_F(Targets, EachOneComputesTheSameWithinRounding) {
  Problem p = testing::small_neighborhood();
  p.head_dim = 19;
  const Problem v = validate(p);
  Tensor<float> query(v.query_shape(), 1U), key(v.key_shape(), 2U), value(v.value_shape(), 3U);
  Tensor<float> want(v.output_shape(), 0.F);
  const AttentionInputs in{.query = query.view(), .key = key.view(), .value = value.view()};
  forward(choose_plan(v, {.engine = Engine::reference}), in, want.view());
  for (const std::string& target : cpu_targets_available()) {
    limit_cpu_target(target);
    Tensor<float> out(v.output_shape(), 0.F);
    forward(choose_plan(v, {.engine = Engine::cpu}), in, out.view());
    for (std::size_t i = 0; i < out.data.size(); ++i) {
      EXPECT_NEAR(out.data[i], want.data[i], 1e-5F) << target << " at " << i;
    }
  }
}

TEST_F(Targets, OtherNamesAreRefusedAndChangeNothing) {
  expect_invalid([] { limit_cpu_target("MMX"); }, "cpu target", "'MMX'", cpu_targets_available().front());
  EXPECT_NO_THROW(do_something());
}

TEST(Threads, DefaultIsAtLeastOne) { EXPECT_GE(default_threads(), 1); }

}  // namespace
}  // namespace vicus
