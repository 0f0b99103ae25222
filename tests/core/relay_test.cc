// The backward pass whose segments hand key blocks on: few heads on several threads.
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "testing.h"

namespace vicus {
namespace {

using testing::Tensor;

struct Case {
  std::string name;
  Problem problem;
};

Problem dense(std::int64_t queries, const Dense& mask, std::int64_t heads = 1, std::int64_t heads_kv = 1) {
  Problem p;
  p.layout = queries;
  p.heads = heads;
  p.heads_kv = heads_kv;
  p.head_dim = 24;
  p.head_dim_v = 40;
  p.mask = mask;
  return validate(p);
}

Problem windows(std::int64_t kernel_size, std::int64_t dilation = 1) {
  Problem p;
  p.layout = 900 * dilation;
  p.head_dim = p.head_dim_v = 16;
  p.mask = Neighborhood{.kernel_size = kernel_size, .dilation = dilation};
  return validate(p);
}

std::vector<Case> cases() {
  Problem two = dense(640, {.keys = 640});
  two.batch = 2;
  Problem wide = dense(500, {.keys = 700});
  wide.dtype = DType::float64;
  return {{"full", dense(1000, {.keys = 1000})},
          {"keys", dense(300, {.keys = 1111})},
          {"causal", dense(1000, {.keys = 1000, .causal = Causal::top_left})},
          {"keys that no query sees", dense(1000, {.keys = 1200, .causal = Causal::top_left})},
          {"queries that see no key", dense(1511, {.keys = 900, .causal = Causal::bottom_right})},
          {"sliding", dense(1000, {.keys = 1000, .window_left = 400, .window_right = 100})},
          {"padded", dense(800, {.keys = 800, .key_lengths = {555}})},
          {"packed", dense(1600, {.keys = 1500,
                                  .cumulative_queries = {0, 1300, 1300, 1600},
                                  .cumulative_keys = {0, 1200, 1210, 1500}})},
          {"three heads", dense(700, {.keys = 700}, 3, 3)},
          {"two entries", two},
          {"float64", wide},
          {"window", windows(701)},
          {"dilated", windows(600, 3)}};
}

template <class T>
struct Gradients {
  explicit Gradients(const Problem& p)
      : query(p.query_shape(), T{9}), key(p.key_shape(), T{9}), value(p.value_shape(), T{9}) {}
  Tensor<T> query, key, value;
};

/// Of engine cpu on so many threads, or of the reference.
template <class T>
class Pass {
 public:
  explicit Pass(const Problem& problem)
      : p_(problem),
        q_(p_.query_shape(), 1U),
        k_(p_.key_shape(), 2U),
        v_(p_.value_shape(), 3U),
        out_(p_.output_shape(), T{0}),
        lse_(p_.logsumexp_shape(), T{0}),
        grad_(p_.output_shape(), 4U) {
    forward(choose_plan(p_, {.engine = Engine::reference}), inputs(), out_.view(), lse_.view());
  }
  Gradients<T> backward(const Plan& plan, bool query = true, bool key = true, bool value = true) {
    Gradients<T> g(p_);
    vicus::backward(plan, inputs(), {.output = out_.view(), .logsumexp = lse_.view(), .grad_output = grad_.view()},
                    {.query = query ? g.query.view() : TensorView{},
                     .key = key ? g.key.view() : TensorView{},
                     .value = value ? g.value.view() : TensorView{}});
    return g;
  }

 private:
  AttentionInputs inputs() { return {.query = q_.view(), .key = k_.view(), .value = v_.view()}; }
  const Problem p_;
  Tensor<T> q_, k_, v_, out_, lse_, grad_;
};

template <class T>
void check(const Case& c) {
  SCOPED_TRACE(c.name);
  Pass<T> pass(c.problem);
  const Gradients<T> want = pass.backward(choose_plan(c.problem, {.engine = Engine::reference}));
  const Gradients<T> alone = pass.backward(choose_plan(c.problem, {.engine = Engine::cpu, .threads = 1}));
  bool relayed = false;
  for (const int threads : {2, 3, 7}) {
    const Plan plan = choose_plan(c.problem, {.engine = Engine::cpu, .threads = threads});
    relayed = relayed || plan.backward.relay;
    for (int i = 0; i < 5; ++i) {
      const Gradients<T> got = pass.backward(plan);
      EXPECT_EQ(got.query.data, alone.query.data);
      EXPECT_EQ(got.key.data, alone.key.data);
      EXPECT_EQ(got.value.data, alone.value.data);
    }
    EXPECT_EQ(pass.backward(plan, false, true, false).key.data, alone.key.data);
    EXPECT_EQ(pass.backward(plan, false, false, true).value.data, alone.value.data);
    EXPECT_EQ(pass.backward(plan, true, false, false).query.data, alone.query.data);
  }
  EXPECT_TRUE(relayed);
  const auto near = [](const std::vector<T>& got, const std::vector<T>& expected) {
    for (std::size_t i = 0; i < got.size(); ++i) {
      ASSERT_LE(std::abs(got[i] - expected[i]), 1e-4 * std::max(1.0, std::abs(static_cast<double>(expected[i])))) << i;
    }
  };
  near(alone.query.data, want.query.data);
  near(alone.key.data, want.key.data);
  near(alone.value.data, want.value.data);
}

TEST(Relay, GivesTheBitsOfOneThread) {
  for (const Case& c : cases()) {
    if (c.problem.dtype == DType::float64) check<double>(c);
    else check<float>(c);
  }
}

TEST(Relay, IsForFewHeadsWhoseSumsTheOutputHolds) {
  Problem p = dense(1000, {.keys = 1000});
  EXPECT_TRUE(choose_plan(p, {.threads = 2}).backward.relay);
  EXPECT_EQ(choose_plan(p, {.threads = 2}).backward.border_blocks, 0);
  EXPECT_FALSE(choose_plan(p, {.threads = 1}).backward.relay);
  EXPECT_FALSE(choose_plan(dense(1000, {.keys = 1000}, 8, 8), {.threads = 2}).backward.relay);
  EXPECT_FALSE(choose_plan(dense(1000, {.keys = 1000}, 90, 1), {.threads = 2}).backward.relay);
  p.dtype = DType::bfloat16;
  EXPECT_FALSE(choose_plan(p, {.threads = 2}).backward.relay);
}

}  // namespace
}  // namespace vicus
