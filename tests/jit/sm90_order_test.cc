// In which order blocks of engine sm90 take tiles: divisions by known divisors, and what a launch is told.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "device_tensor.h"
#include "gpu/sm90_args.h"
#include "hopper_problems.h"
#include "launched.h"
#include "vicus/vicus.hpp"

namespace vicus {
namespace {

using vicus::testing::dense_problem;
using vicus::testing::kH100;
using vicus::testing::problem_of;
using vicus::testing::Tensor;
using vicus::testing::told;

constexpr int kMost = 2147483647;

TEST(Order, DivisorsDivide) {
  std::mt19937 random(1);
  std::uniform_int_distribution<int> any(1, kMost);
  const auto check = [](int divisor, int n) {
    const gpu::Divisor d(divisor);
    ASSERT_EQ(d.divide(n), n / divisor) << n << " by " << divisor;
    ASSERT_EQ(d.remainder(n), n % divisor) << n << " by " << divisor;
  };
  for (int i = 0; i < 20000; ++i) {
    const int divisor = i < 3000 ? i + 1 : i % 2 == 0 ? any(random) : 1 << i % 31;
    for (const int n : {0, 1, divisor - 1, divisor, kMost, kMost - 1, kMost / divisor * divisor - 1, any(random)}) {
      check(divisor, n);
      if (n < kMost - 1) check(divisor, n + 1);
    }
  }
  EXPECT_EQ(gpu::Divisor().divide(7), 7);
}

// What the forward kernel of a problem is told of its tiles.
gpu::Sm90Args told_forward(const Problem& problem) {
  const Plan plan = choose_plan(problem, {.engine = Engine::sm90, .gpu = kH100});
  const Problem& p = plan.problem;
  const Tensor query(p.dtype, p.query_shape()), key(p.dtype, p.key_shape()), value(p.dtype, p.value_shape());
  const Tensor output(p.dtype, p.output_shape());
  int stream = 0;
  return told<gpu::Sm90Args>("sm90_forward",
                             [&] {
                               forward(plan, {.query = query.view, .key = key.view, .value = value.view}, output.view,
                                       {}, &stream);
                             })
      .at(0);
}

TEST(Order, EveryTileHasOneNumberAndCausalAxesComeLast) {
  for (const std::array<int, 3> causal : {std::array{0, 0, 0}, {0, 1, 0}, {1, 0, 1}, {0, 0, 1}}) {
    Problem p = problem_of({20, 30, 40}, {.kernel_size = 9, .is_causal = {causal[0], causal[1], causal[2]}}, 128);
    p.heads = 6;
    p.heads_kv = 2;
    const gpu::Sm90Args args = told_forward(p);
    const gpu::TileOrder& order = args.forward.order;
    std::set<std::array<int, 3>> seen;
    for (int n = 0; n < static_cast<int>(order.all.value); ++n) {
      std::array<int, 3> at{};
      for (std::size_t a = 0; a < 3; ++a) at[a] = order.tiles[a].remainder(order.step[a].divide(n));
      seen.insert(at);
    }
    EXPECT_EQ(seen.size(), order.all.value) << "all of them, each once";
    for (std::size_t a = 0; a < 3; ++a) {
      EXPECT_EQ(static_cast<int>(order.tiles[a].value), args.forward.work.tiles[a]);
      for (std::size_t b = 0; b < 3; ++b) {
        if (causal[a] > causal[b]) {
          EXPECT_GT(order.step[a].value, order.step[b].value) << a << " after " << b;
        }
      }
    }
    EXPECT_EQ(order.group, 3);
    EXPECT_EQ(order.group_blocks.value * 2, order.head_blocks.value);
    EXPECT_EQ(args.tiles, static_cast<int>(order.all.value * order.head_blocks.value) * static_cast<int>(p.batch));
  }
}

TEST(Order, HeadsTakeTurns) {
  for (const auto& [tiles, heads, turns] : {std::array{5, 7, 3}, {5, 6, 3}, {1, 9, 4}, {4, 3, 8}, {6, 1, 1}}) {
    gpu::TileOrder order;
    order.all = gpu::Divisor(tiles);
    order.take_turns(heads, turns);
    std::vector<int> all;
    for (int n = 0; n < tiles * heads; ++n) {
      const int tile = order.nth(n), head = tile / tiles, first = n / (tiles * turns) * turns;
      EXPECT_GE(head, first);
      EXPECT_LT(head, first + turns);
      if (n % (tiles * turns) != 0) {
        EXPECT_GE(tile % tiles, all.back() % tiles) << "long ones first";
      }
      all.push_back(tile);
    }
    std::sort(all.begin(), all.end());
    for (int n = 0; n < tiles * heads; ++n) EXPECT_EQ(all.at(static_cast<std::size_t>(n)), n) << "each once";
  }
}

Problem causal(std::int64_t tokens, std::int64_t head_dim, std::int64_t batch, std::int64_t heads,
               std::int64_t heads_kv) {
  Problem p = dense_problem(tokens, tokens, {.causal = Causal::top_left});
  p.head_dim = p.head_dim_v = head_dim;
  p.batch = batch;
  p.heads = heads;
  p.heads_kv = heads_kv;
  return p;
}

TEST(Order, NoBlockHasMuchMoreThanOthers) {
  for (const Problem& p : {causal(4096, 64, 2, 32, 4), causal(4096, 64, 4, 16, 16), causal(2048, 64, 8, 16, 16),
                           causal(1024, 64, 16, 16, 16), causal(1024, 128, 16, 16, 16), causal(16384, 64, 2, 16, 16)}) {
    const gpu::Sm90Args args = told_forward(p);
    const int tiles = args.forward.work.tiles[2], blocks = kH100.multiprocessors;
    double most = 0, all = 0;
    for (int block = 0; block < blocks; ++block) {
      double work = 0;
      for (int round = 0; round * blocks < args.tiles; ++round) {
        const int n = gpu::tile_of_round(round, block, blocks);
        if (n < args.tiles) work += 1 + tiles - args.forward.order.nth(n) % tiles;
      }
      most = std::max(most, work);
      all += work;
    }
    EXPECT_LT(most * blocks / all, 1.06) << p.queries() << " tokens, D " << p.head_dim;
  }
}

TEST(Order, HowManyHeadsTakeTurns) {
  const auto turns = [](const Problem& p) {
    const GpuPlan g = choose_plan(p, {.engine = Engine::sm90, .gpu = kH100}).gpu;
    return std::array{g.forward.heads_in_turns, g.backward.keys.heads_in_turns};
  };
  Problem full = causal(4096, 128, 4, 16, 16);
  std::get<Dense>(full.mask).causal = Causal::none;
  EXPECT_EQ(turns(full), (std::array{1, 1}));
  EXPECT_EQ(turns(problem_of({64, 64}, {.kernel_size = 40, .is_causal = {1, 0}}, 128)), (std::array{2, 1}));
  // As measured: notes/sm90_backward.md.
  EXPECT_EQ(turns(causal(16384, 128, 2, 16, 16)), (std::array{11, 2}));
  EXPECT_EQ(turns(causal(8192, 128, 4, 16, 16))[1], 4);
  EXPECT_EQ(turns(causal(8192, 128, 2, 32, 8))[1], 2) << "two of a group at a time";
  EXPECT_EQ(turns(causal(16384, 128, 1, 32, 8))[1], 2);
  EXPECT_EQ(turns(causal(16384, 64, 2, 16, 4))[1], 2) << "four inside";
  EXPECT_EQ(turns(causal(4096, 128, 1, 64, 8))[1], 4) << "blocks are few";
  EXPECT_EQ(turns(causal(2048, 128, 4, 32, 4))[1], 8) << "a wave of them";
  EXPECT_EQ(turns(causal(512, 128, 32, 16, 16))[0], 11) << "tiles are few";
}

TEST(Order, WhereABlockTakesTheHeadsOfAGroupTogether) {
  const auto inside = [](const Problem& p, bool deterministic = false) {
    const PlanOptions options = {.engine = Engine::sm90, .backward = {.deterministic = deterministic}, .gpu = kH100};
    return choose_plan(p, options).gpu.backward.keys.heads_inside;
  };
  EXPECT_FALSE(inside(causal(8192, 128, 2, 32, 8)));
  EXPECT_TRUE(inside(causal(8192, 128, 2, 32, 8), true)) << "no sums of dQ";
  EXPECT_FALSE(inside(causal(16384, 128, 1, 32, 8)));
  EXPECT_TRUE(inside(causal(16384, 64, 2, 16, 4))) << "short head dims";
  EXPECT_TRUE(inside(causal(4096, 128, 1, 64, 8))) << "few blocks";
  EXPECT_TRUE(inside(causal(8192, 128, 1, 16, 1)));
  EXPECT_TRUE(inside(causal(16384, 128, 1, 8, 2)));
  EXPECT_FALSE(inside(causal(16384, 128, 1, 16, 2))) << "too much to load";
  EXPECT_TRUE(inside(causal(16384, 128, 2, 16, 16))) << "no groups";
  Problem full = causal(16384, 128, 1, 32, 8);
  std::get<Dense>(full.mask).causal = Causal::none;
  EXPECT_TRUE(inside(full)) << "blocks stay together";
}

// What the kernel for keys of a problem with one head is told.
gpu::Sm90BackwardArgs told_keys(Problem problem) {
  problem.batch = problem.heads = problem.heads_kv = 1;
  const Plan plan = choose_plan(problem, {.engine = Engine::sm90, .gpu = kH100});
  const Problem& p = plan.problem;
  const Tensor query(p.dtype, p.query_shape()), key(p.dtype, p.key_shape()), value(p.dtype, p.value_shape());
  const Tensor output(p.dtype, p.output_shape()), logsumexp(DType::float32, p.logsumexp_shape());
  const Tensor grad_key(p.dtype, p.key_shape());
  int stream = 0;
  const auto args = told<gpu::Sm90BackwardArgs>("sm90_backward", [&] {
    backward(plan, {.query = query.view, .key = key.view, .value = value.view},
             {.output = output.view, .logsumexp = logsumexp.view, .grad_output = output.view}, {.key = grad_key.view},
             &stream);
  });
  EXPECT_EQ(args.size(), 1U);
  return args.at(0);
}

// In which order its blocks go through the axes.
std::array<unsigned, 3> steps_of_gradients(const Problem& problem) {
  const gpu::TileOrder order = told_keys(problem).backward.order;
  EXPECT_EQ(order.at_once, kH100.multiprocessors);
  return {order.step[0].value, order.step[1].value, order.step[2].value};
}

TEST(Order, GradientsBeginWithAxesWhoseNeighborsShareMost) {
  const auto square = steps_of_gradients(problem_of({256, 256}, {.kernel_size = 80}, 128));
  EXPECT_EQ(square[2], 1U) << "nothing to choose: along the last axis";
  EXPECT_GT(square[1], 1U);
  for (const AxisValues stride : {AxisValues{1, 1, 1}, AxisValues{16, 8, 8}}) {
    const Neighborhood mask = {.kernel_size = {18, 24, 24}, .stride = stride};
    const auto steps = steps_of_gradients(problem_of({30, 48, 80}, mask, 128));
    EXPECT_EQ(steps[0], 1U) << "30 tokens for windows of 18, in tiles of 2";
    EXPECT_LT(steps[2], steps[1]);
  }
}

TEST(Order, MoreTilesThanAnIntCountsAreRefused) {
  // Of 65536 x 40000 x 1 tokens, each a tile; nothing reads the tensors.
  Problem problem = problem_of({65536, 40000, 1}, {.kernel_size = {3, 3, 1}}, 16);
  problem.batch = problem.heads = problem.heads_kv = 1;
  const PlanOptions options{.engine = Engine::sm90, .tile_q = {1, 1, 64}, .gpu = kH100};
  const Plan plan = choose_plan(problem, options);
  const Problem& p = plan.problem;
  ASSERT_EQ(plan.gpu.forward.tile.extent, (std::array{1, 1, 64}));
  const Tensor memory(p.dtype, {64});
  const std::vector<std::int64_t> shape = p.query_shape();
  const auto view = [&](std::int64_t elements) {
    return TensorView(static_cast<std::uint16_t*>(memory.view.data()) + elements, p.dtype,
                      TensorLayout(std::span<const std::int64_t>(shape)));
  };
  const TensorView output = view(0), query = view(std::int64_t{1} << 40);
  int stream = 0;
  try {
    forward(plan, {.query = query, .key = query, .value = query}, output, {}, &stream);
    FAIL() << "launched";
  } catch (const Unsupported& error) {
    EXPECT_NE(std::string(error.what()).find("tiles of queries"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace vicus
