// The operators refuse wrong tensors before they write anything, on every engine.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "testing.h"

namespace vicus {
namespace {

using testing::expect_invalid;
using testing::Tensor;
using Shape = std::vector<std::int64_t>;

constexpr float kUntouched = 123.F;

/// Tensors of one valid call each of forward and backward; a test spoils one view.
struct Call {
  Problem problem;
  Tensor<float> query, key, value, extra_keys, extra_values, bias;
  Tensor<float> output, logsumexp, saved_output, saved_logsumexp, grad_output;
  Tensor<float> grad_query, grad_key, grad_value, grad_extra_keys, grad_extra_values, grad_bias;
  AttentionInputs in;
  AttentionGradInputs grad_in;
  AttentionGradients grads;
  TensorView out, lse;

  explicit Call(const Problem& p)
      : problem(p),
        query(p.query_shape(), 1U),
        key(p.key_shape(), 2U),
        value(p.value_shape(), 3U),
        extra_keys(p.additional_keys_shape(), 4U),
        extra_values(p.additional_values_shape(), 5U),
        bias(p.rpb_shape(), 6U),
        output(p.output_shape(), kUntouched),
        logsumexp(p.logsumexp_shape(), kUntouched),
        saved_output(p.output_shape(), 7U),
        saved_logsumexp(p.logsumexp_shape(), 8U),
        grad_output(p.output_shape(), 9U),
        grad_query(p.query_shape(), kUntouched),
        grad_key(p.key_shape(), kUntouched),
        grad_value(p.value_shape(), kUntouched),
        grad_extra_keys(p.additional_keys_shape(), kUntouched),
        grad_extra_values(p.additional_values_shape(), kUntouched),
        grad_bias(p.rpb_shape(), kUntouched),
        out(output.view()),
        lse(logsumexp.view()) {
    in.query = query.view();
    in.key = key.view();
    in.value = value.view();
    in.additional_keys = extra_keys.view();
    in.additional_values = extra_values.view();
    in.rpb = bias.view();
    grad_in.output = saved_output.view();
    grad_in.logsumexp = saved_logsumexp.view();
    grad_in.grad_output = grad_output.view();
    grads.query = grad_query.view();
    grads.key = grad_key.view();
    grads.value = grad_value.view();
    grads.additional_keys = grad_extra_keys.view();
    grads.additional_values = grad_extra_values.view();
    grads.rpb = grad_bias.view();
  }

  [[nodiscard]] std::vector<Tensor<float>*> written() {
    return {&output, &logsumexp, &grad_query, &grad_key, &grad_value, &grad_extra_keys, &grad_extra_values, &grad_bias};
  }
};

Problem full_problem() {
  Problem p;
  p.batch = 2;
  p.layout = {4, 5};
  p.heads = 4;
  p.heads_kv = 2;
  p.head_dim = 8;
  p.head_dim_v = 6;
  p.additional_tokens = 3;
  p.rpb = true;
  p.mask = Neighborhood{.kernel_size = 3};
  return validate(p);
}

TensorView with_shape(const TensorView& t, const Shape& shape) { return {t.data(), t.dtype(), TensorLayout(shape)}; }
TensorView with_strides(const TensorView& t, const Shape& strides) {
  return {t.data(), t.dtype(), TensorLayout(t.shape(), strides)};
}
TensorView with_dtype(const TensorView& t, DType dtype) { return {t.data(), dtype, t}; }
TensorView without_data(const TensorView& t) { return {nullptr, t.dtype(), t}; }

enum class Operator { forward, backward };

struct Spoiled {
  std::string name;
  Operator op;
  std::function<void(Call&)> spoil;
  std::string argument, got, allowed;
};
void PrintTo(const Spoiled& spoiled, std::ostream* out) { *out << spoiled.name; }

class Refusals : public ::testing::TestWithParam<std::tuple<Engine, Spoiled>> {};

TEST_P(Refusals, LeaveEveryOutputUntouched) {
  const Spoiled& spoiled = std::get<1>(GetParam());
  Call call(full_problem());
  const Plan plan = choose_plan(call.problem, {.engine = std::get<0>(GetParam())});
  spoiled.spoil(call);
  expect_invalid(
      [&] {
        if (spoiled.op == Operator::forward) {
          forward(plan, call.in, call.out, call.lse);
        } else {
          backward(plan, call.in, call.grad_in, call.grads);
        }
      },
      spoiled.argument, spoiled.got, spoiled.allowed);
  for (const Tensor<float>* tensor : call.written()) {
    EXPECT_TRUE(std::all_of(tensor->data.begin(), tensor->data.end(), [](float x) { return x == kUntouched; }));
  }
}

std::vector<Spoiled> spoiled_calls() {
  constexpr auto kForward = Operator::forward;
  constexpr auto kBackward = Operator::backward;
  return {
      {"QueryAbsent", kForward, [](Call& c) { c.in.query = {}; }, "query", "absent", "a tensor"},
      {"QueryShape", kForward, [](Call& c) { c.in.query = with_shape(c.query.view(), {2, 5, 4, 4, 8}); }, "query.shape",
       "[2, 5, 4, 4, 8]", "[2, 4, 5, 4, 8]"},
      {"QueryWithoutData", kForward, [](Call& c) { c.in.query = without_data(c.query.view()); }, "query",
       "a null pointer", "data"},
      {"QueryDtype", kForward, [](Call& c) { c.in.query = with_dtype(c.query.view(), DType::float16); }, "query.dtype",
       "float16", "float32"},
      {"QueryRows", kForward, [](Call& c) { c.in.query = with_strides(c.query.view(), {640, 160, 32, 1, 4}); },
       "query.strides[4]", "4", "1"},
      {"KeyHeads", kForward, [](Call& c) { c.in.key = with_shape(c.key.view(), {2, 4, 5, 1, 8}); }, "key.shape",
       "[2, 4, 5, 1, 8]", "[2, 4, 5, 2, 8]"},
      {"KeyDtype", kForward, [](Call& c) { c.in.key = with_dtype(c.key.view(), DType::float64); }, "key.dtype",
       "float64", "float32"},
      {"ValueAbsent", kForward, [](Call& c) { c.in.value = {}; }, "value", "absent", "a tensor"},
      {"ValueShape", kForward, [](Call& c) { c.in.value = with_shape(c.value.view(), {2, 4, 5, 2, 5}); }, "value.shape",
       "[2, 4, 5, 2, 5]", "[2, 4, 5, 2, 6]"},
      {"AdditionalKeysAbsent", kForward, [](Call& c) { c.in.additional_keys = {}; }, "additional_keys", "absent",
       "a tensor"},
      {"AdditionalValuesShape", kForward,
       [](Call& c) { c.in.additional_values = with_shape(c.extra_values.view(), {2, 2, 2, 6}); },
       "additional_values.shape", "[2, 2, 2, 6]", "[2, 3, 2, 6]"},
      {"RpbAbsent", kForward, [](Call& c) { c.in.rpb = {}; }, "rpb", "absent", "a tensor"},
      {"RpbShape", kForward, [](Call& c) { c.in.rpb = with_shape(c.bias.view(), {4, 3, 3}); }, "rpb.shape", "[4, 3, 3]",
       "[4, 5, 5]"},
      {"RpbDtype", kForward, [](Call& c) { c.in.rpb = with_dtype(c.bias.view(), DType::bfloat16); }, "rpb.dtype",
       "bfloat16", "float32, float64"},
      {"AttnBiasGiven", kForward, [](Call& c) { c.in.attn_bias = c.bias.view(); }, "attn_bias", "given", "absent"},
      {"OutputAbsent", kForward, [](Call& c) { c.out = {}; }, "output", "absent", "a tensor"},
      {"OutputShape", kForward, [](Call& c) { c.out = with_shape(c.output.view(), {2, 4, 5, 4, 5}); }, "output.shape",
       "[2, 4, 5, 4, 5]", "[2, 4, 5, 4, 6]"},
      {"OutputDtype", kForward, [](Call& c) { c.out = with_dtype(c.output.view(), DType::bfloat16); }, "output.dtype",
       "bfloat16", "float32"},
      {"OutputRows", kForward, [](Call& c) { c.out = with_strides(c.output.view(), {480, 120, 24, 1, 4}); },
       "output.strides[4]", "4", "1"},
      {"OutputBroadcast", kForward, [](Call& c) { c.out = with_strides(c.output.view(), {0, 120, 24, 6, 1}); },
       "output.strides[0]", "0", "its own place"},
      {"OutputRowsOverlap", kForward, [](Call& c) { c.out = with_strides(c.output.view(), {480, 120, 24, 5, 1}); },
       "output.strides[3]", "5", "its own place"},
      {"LogsumexpShape", kForward, [](Call& c) { c.lse = with_shape(c.logsumexp.view(), {2, 4, 5, 2}); },
       "logsumexp.shape", "[2, 4, 5, 2]", "[2, 4, 5, 4]"},
      {"LogsumexpDtype", kForward, [](Call& c) { c.lse = with_dtype(c.logsumexp.view(), DType::float64); },
       "logsumexp.dtype", "float64", "float32"},
      {"LogsumexpOverlap", kForward, [](Call& c) { c.lse = with_strides(c.logsumexp.view(), {80, 20, 4, 0}); },
       "logsumexp.strides[3]", "0", "its own place"},
      {"BackwardQueryAbsent", kBackward, [](Call& c) { c.in.query = {}; }, "query", "absent", "a tensor"},
      {"SavedOutputAbsent", kBackward, [](Call& c) { c.grad_in.output = {}; }, "output", "absent", "a tensor"},
      {"SavedLogsumexpAbsent", kBackward, [](Call& c) { c.grad_in.logsumexp = {}; }, "logsumexp", "absent", "a tensor"},
      {"GradOutputShape", kBackward,
       [](Call& c) { c.grad_in.grad_output = with_shape(c.grad_output.view(), {2, 4, 5, 2, 6}); }, "grad_output.shape",
       "[2, 4, 5, 2, 6]", "[2, 4, 5, 4, 6]"},
      {"GradLogsumexpShape", kBackward,
       [](Call& c) { c.grad_in.grad_logsumexp = with_shape(c.saved_logsumexp.view(), {2, 4, 5, 1}); },
       "grad_logsumexp.shape", "[2, 4, 5, 1]", "[2, 4, 5, 4]"},
      {"GradQueryShape", kBackward, [](Call& c) { c.grads.query = with_shape(c.grad_query.view(), {1, 4, 5, 4, 8}); },
       "grad_query.shape", "[1, 4, 5, 4, 8]", "[2, 4, 5, 4, 8]"},
      {"GradKeyDtype", kBackward, [](Call& c) { c.grads.key = with_dtype(c.grad_key.view(), DType::float16); },
       "grad_key.dtype", "float16", "float32"},
      {"GradValueOverlap", kBackward,
       [](Call& c) { c.grads.value = with_strides(c.grad_value.view(), {240, 60, 12, 0, 1}); }, "grad_value.strides[3]",
       "0", "its own place"},
      {"GradAdditionalKeysShape", kBackward,
       [](Call& c) { c.grads.additional_keys = with_shape(c.grad_extra_keys.view(), {2, 1, 2, 8}); },
       "grad_additional_keys.shape", "[2, 1, 2, 8]", "[2, 3, 2, 8]"},
      {"GradRpbDtype", kBackward, [](Call& c) { c.grads.rpb = with_dtype(c.grad_bias.view(), DType::float64); },
       "grad_rpb.dtype", "float64", "float32"},
      {"GradRpbOverlap", kBackward, [](Call& c) { c.grads.rpb = with_strides(c.grad_bias.view(), {25, 5, 2}); },
       "grad_rpb.strides[1]", "5", "its own place"},
  };
}

INSTANTIATE_TEST_SUITE_P(All, Refusals,
                         ::testing::Combine(::testing::Values(Engine::reference, Engine::cpu),
                                            ::testing::ValuesIn(spoiled_calls())),
                         [](const auto& test) {
                           return std::string(engine_name(std::get<0>(test.param))) + "_" +
                                  std::get<1>(test.param).name;
                         });

TEST(Checks, TheCallThatTheRefusalsSpoilIsGood) {
  for (const Engine engine : {Engine::reference, Engine::cpu}) {
    Call call(full_problem());
    const Plan plan = choose_plan(call.problem, {.engine = engine});
    EXPECT_NO_THROW(forward(plan, call.in, call.out, call.lse));
    EXPECT_NO_THROW(backward(plan, call.in, call.grad_in, call.grads));
    for (const Tensor<float>* tensor : call.written()) {
      EXPECT_TRUE(std::none_of(tensor->data.begin(), tensor->data.end(), [](float x) { return x == kUntouched; }))
          << "every element of every output is written";
    }
  }
}

TEST(Checks, WhatTheProblemDoesNotAskForIsRefused) {
  Problem p = full_problem();
  p.additional_tokens = 0;
  p.rpb = false;
  Call good(full_problem());
  const Plan plan = choose_plan(p);
  AttentionInputs in{.query = good.query.view(), .key = good.key.view(), .value = good.value.view()};
  EXPECT_NO_THROW(forward(plan, in, good.out));
  in.rpb = good.bias.view();
  expect_invalid([&] { forward(plan, in, good.out); }, "rpb", "given", "absent");
  in.rpb = {};
  in.additional_keys = good.extra_keys.view();
  expect_invalid([&] { forward(plan, in, good.out); }, "additional_keys", "given", "absent");
  in.additional_keys = {};
  in.additional_values = good.extra_values.view();
  expect_invalid([&] { forward(plan, in, good.out); }, "additional_values", "given", "absent");
}

TEST(Checks, AttnBiasMayBeBroadcastButNotResized) {
  Problem p = testing::small_dense();
  p.attn_bias = true;
  p = validate(p);
  const Plan plan = choose_plan(p);
  Tensor<float> q(p.query_shape(), 1U), k(p.key_shape(), 2U), v(p.value_shape(), 3U), out(p.output_shape(), 0.F);
  Tensor<float> bias({2, 4, 10, 12}, 4U);
  AttentionInputs in{.query = q.view(), .key = k.view(), .value = v.view()};
  expect_invalid([&] { forward(plan, in, out.view()); }, "attn_bias", "absent", "a tensor");
  for (const Shape& shape : {Shape{2, 4, 10, 12}, Shape{1, 4, 10, 12}, Shape{2, 1, 10, 12}, Shape{1, 1, 10, 12}}) {
    in.attn_bias = with_shape(bias.view(), shape);
    EXPECT_NO_THROW(forward(plan, in, out.view()));
  }
  in.attn_bias = with_shape(bias.view(), {2, 4, 10, 11});
  expect_invalid([&] { forward(plan, in, out.view()); }, "attn_bias.shape", "[2, 4, 10, 11]", "[2, 4, 10, 12]");
  in.attn_bias = with_shape(bias.view(), {2, 2, 10, 12});
  expect_invalid([&] { forward(plan, in, out.view()); }, "attn_bias.shape", "[2, 2, 10, 12]", "[2, 4, 10, 12]");
}

TEST(Checks, Float64KeepsLogsumexpInEitherPrecision) {
  Problem p = testing::small_neighborhood();
  p.dtype = DType::float64;
  p = validate(p);
  const Plan plan = choose_plan(p);
  Tensor<double> q(p.query_shape(), 1U), k(p.key_shape(), 2U), v(p.value_shape(), 3U), out(p.output_shape(), 0.);
  Tensor<double> wide(p.logsumexp_shape(), 0.);
  Tensor<float> narrow(p.logsumexp_shape(), 0.F);
  const AttentionInputs in{.query = q.view(), .key = k.view(), .value = v.view()};
  forward(plan, in, out.view(), wide.view());
  forward(plan, in, out.view(), narrow.view());
  for (std::size_t i = 0; i < wide.data.size(); ++i) EXPECT_EQ(static_cast<float>(wide.data[i]), narrow.data[i]);
}

}  // namespace
}  // namespace vicus
