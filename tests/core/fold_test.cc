// Folded windows: keys a window apart share scores where no query of a tile sees both.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "cpu/tiles.h"
#include "testing.h"

namespace vicus {
namespace {

using cpu::Fold;
using cpu::Masks;
using KeyRun = cpu::Run;
using cpu::Tile;
using geometry::Box;
using geometry::Grid;
using testing::Tensor;

constexpr int kWords = 4096;

/// Takes the masks and runs of a tile apart again: each lane must find each key it sees in one row of scores, and no other.
void check_tile(const Grid& grid, const Tile& tile, int axis, Masks& masks, std::vector<KeyRun>& runs) {
  const Box sub = geometry::hull(grid, tile.box);
  const std::uint64_t* mask = masks.of(grid, tile, sub, axis);
  const Fold& fold = masks.fold();
  const int count = cpu::make_runs(sub, sub, runs.data(), std::numeric_limits<int>::max(), fold);
  std::vector<std::map<int, int>> found(cpu::kFoldRows);  // of each lane: packed key, how often
  int row = 0;
  for (int r = 0; r < count; ++r) {
    for (int first = 0; first < cpu::kFoldRows; first += cpu::kFoldLanes) {
      const std::uint64_t block = runs[static_cast<std::size_t>(r)].others >> first & 15U;
      ASSERT_TRUE(block == 0 || block == 15U) << "a block of lanes must agree";
    }
    for (KeyRun rest = runs[static_cast<std::size_t>(r)]; rest.len > 0; ++row) {
      const KeyRun one = rest.take(1);
      for (int lane = 0; lane < cpu::kFoldRows; ++lane) {
        if ((mask[row] >> lane & 1) == 0) continue;
        ++found[static_cast<std::size_t>(lane)][(one.others >> lane & 1) != 0 ? one.other : one.start];
      }
    }
  }
  EXPECT_EQ(row, fold.size(sub, 0) * fold.size(sub, 1) * sub.axis[2].size());
  std::vector<std::map<int, int>> want(cpu::kFoldRows);
  tile.for_each_lane([&](int lane, int, const Position& q) {
    int key = 0;
    for (int i = sub.axis[0].begin; i < sub.axis[0].end; ++i) {
      for (int j = sub.axis[1].begin; j < sub.axis[1].end; ++j) {
        for (int k = sub.axis[2].begin; k < sub.axis[2].end; ++k, ++key) {
          const auto sees = [&](int a, int at) {
            const geometry::Span window = geometry::window(grid.axis[a], q[static_cast<std::size_t>(a)]);
            return window.begin <= at && at < window.end;
          };
          if (sees(0, i) && sees(1, j) && sees(2, k)) want[static_cast<std::size_t>(lane)][key] = 1;
        }
      }
    }
  });
  ASSERT_EQ(found, want);
}

TEST(Fold, EveryLaneFindsItsKeysOnce) {
  std::vector<std::uint64_t> words(kWords), axis_words(kWords);
  std::vector<KeyRun> runs(kWords);
  std::int64_t rows = 0, plain_rows = 0;
  for (const int length : {3, 8, 13}) {
    for (int window = 1; window <= length; ++window) {
      for (int step = 1; step <= window; step += 2) {
        for (const bool causal : {false, true}) {
          for (const std::array<int, 3>& extent : {std::array{1, 4, 4}, std::array{4, 1, 4}, std::array{2, 2, 4}}) {
            Grid grid;
            grid.axis[0] = geometry::neighborhood_axis(6, 3, 1, false);
            grid.axis[1] = geometry::neighborhood_axis(5, 4, 2, causal);
            grid.axis[2] = geometry::neighborhood_axis(7, 3, 1, false);
            const int axis = extent[1] == 4 ? 1 : 0;
            grid.axis[axis] = geometry::neighborhood_axis(length, window, step, causal);
            Masks masks(words.data(), axis_words.data());
            Tile tile;
            tile.extent = extent;
            tile.heads = 1;
            for (int i = 0; i < grid.axis[0].queries; i += extent[0]) {
              for (int j = 0; j < grid.axis[1].queries; j += extent[1]) {
                for (int k = 0; k < grid.axis[2].queries; k += extent[2]) {
                  tile.box = {{{i, std::min(i + extent[0], grid.axis[0].queries)},
                               {j, std::min(j + extent[1], grid.axis[1].queries)},
                               {k, std::min(k + extent[2], grid.axis[2].queries)}}};
                  check_tile(grid, tile, axis, masks, runs);
                  const Box hull = geometry::hull(grid, tile.box);
                  rows += masks.fold().size(hull, axis);
                  plain_rows += hull.axis[axis].size();
                }
              }
            }
            if (::testing::Test::HasFailure()) FAIL() << length << " " << window << " " << step << " " << causal;
          }
        }
      }
    }
  }
  EXPECT_LT(20 * rows, 19 * plain_rows);
}

Problem windows(const AxisValues& layout, const Neighborhood& mask) {
  Problem p;
  p.layout = layout;
  p.head_dim = 24;
  p.head_dim_v = 41;
  p.mask = mask;
  return validate(p);
}

std::map<std::string, Problem> problems() {
  Problem grouped = windows({15, 18}, {.kernel_size = 5});
  grouped.heads = 6;
  grouped.heads_kv = 2;
  Problem wide = windows({21, 23}, {.kernel_size = 7});
  wide.head_dim = 131;
  Problem entries = windows({3, 12, 13}, {.kernel_size = {2, 5, 5}});
  entries.batch = 3;
  return {{"square", windows({21, 23}, {.kernel_size = 7})},
          {"window of the axis", windows({16, 16}, {.kernel_size = {16, 5}})},
          {"strides", windows({25, 24}, {.kernel_size = {6, 7}, .stride = {3, 2}})},
          {"causal", windows({25, 24}, {.kernel_size = 5, .is_causal = {1, 0}})},
          {"dilated", windows({37, 41}, {.kernel_size = 5, .dilation = {2, 3}})},
          {"grouped", grouped},
          {"wide", wide},
          {"frames", windows({9, 12, 13}, {.kernel_size = 5})},
          {"ring along axis 1", windows({10, 20, 12}, {.kernel_size = 7})},
          {"entries", entries}};
}

void expect_near(const Tensor<float>& got, const Tensor<float>& want, double tolerance) {
  for (std::size_t i = 0; i < got.data.size(); ++i) {
    const float x = got.data[i], expected = want.data[i];
    ASSERT_EQ(std::isnan(x), std::isnan(expected)) << i;
    if (!std::isnan(x)) ASSERT_NEAR(x, expected, tolerance * std::max(1.0F, std::abs(expected))) << i;
  }
}

/// Engine cpu against the reference; `spoil` makes one value a NaN, which may reach only queries that see it, and in
/// gradients only keys that these see.
void check(const Problem& p, bool spoil) {
  Tensor<float> q(p.query_shape(), 1U), k(p.key_shape(), 2U), v(p.value_shape(), 3U), grad(p.output_shape(), 4U);
  if (spoil) v.data[v.data.size() / 2] = std::numeric_limits<float>::quiet_NaN();
  const AttentionInputs in = {.query = q.view(), .key = k.view(), .value = v.view()};
  struct Results {
    explicit Results(const Problem& p)
        : output(p.output_shape(), 9.0F),
          logsumexp(p.logsumexp_shape(), 9.0F),
          query(p.query_shape(), 9.0F),
          key(p.key_shape(), 9.0F),
          value(p.value_shape(), 9.0F) {}
    Tensor<float> output, logsumexp, query, key, value;
  };
  const auto run = [&](Engine engine) {
    Results r(p);
    const Plan plan = choose_plan(p, {.engine = engine, .threads = 2});
    forward(plan, in, r.output.view(), r.logsumexp.view());
    backward(plan, in, {.output = r.output.view(), .logsumexp = r.logsumexp.view(), .grad_output = grad.view()},
             {.query = r.query.view(), .key = r.key.view(), .value = r.value.view()});
    return r;
  };
  const Results want = run(Engine::reference), got = run(Engine::cpu);
  expect_near(got.output, want.output, 2e-6);
  expect_near(got.logsumexp, want.logsumexp, 2e-6);
  expect_near(got.query, want.query, 1e-5);
  expect_near(got.key, want.key, 1e-5);
  expect_near(got.value, want.value, 1e-5);
}

TEST(Fold, GivesWhatTheReferenceGives) {
  const std::vector<std::string> targets = cpu_targets_available();
  const bool folds = std::any_of(targets.begin(), targets.end(), [](const auto& t) { return t.starts_with("AVX3"); });
  for (const auto& [name, p] : problems()) {
    SCOPED_TRACE(name);
    const Plan plan = choose_plan(p, {.engine = Engine::cpu, .threads = 2});
    if (folds && name != "window of the axis") {
      EXPECT_GE(plan.forward.fold_axis, 0);
      EXPECT_EQ(plan.backward.fold_axis, plan.forward.fold_axis);
      EXPECT_EQ(plan.forward.roll_axis, p.rank() == 2 || name == "ring along axis 1" ? 1 : 0);
    }
    check(p, false);
    check(p, true);
  }
}

TEST(Fold, IsCountedTileByTile) {
  const ForwardPlan plan = choose_plan(windows({21, 23}, {.kernel_size = 7}), {.engine = Engine::cpu}).forward;
  if (plan.fold_axis < 0) return;  // nothing folds on this machine
  Grid grid;
  grid.axis[1] = geometry::neighborhood_axis(21, 7, 1, false);
  grid.axis[2] = geometry::neighborhood_axis(23, 7, 1, false);
  std::vector<std::uint64_t> words(kWords), axis_words(kWords);
  Masks masks(words.data(), axis_words.data());
  Tile tile;
  tile.extent = plan.tile.extent;
  tile.heads = 1;
  double pairs = 0;
  for (int j = 0; j < 21; j += tile.extent[1]) {
    for (int k = 0; k < 23; k += tile.extent[2]) {
      tile.box = {{{0, 1}, {j, std::min(j + tile.extent[1], 21)}, {k, std::min(k + tile.extent[2], 23)}}};
      const Box hull = geometry::hull(grid, tile.box);
      masks.of(grid, tile, hull, plan.fold_axis);
      pairs += plan.tile.rows * masks.fold().size(hull, 1) * hull.axis[2].size();
    }
  }
  EXPECT_EQ(plan.work.tile_pairs, pairs);
}

TEST(Fold, IsNotForBiases) {
  Problem p = windows({21, 23}, {.kernel_size = 7});
  const Plan folded = choose_plan(p, {.engine = Engine::cpu});
  p.rpb = true;
  const Plan plain = choose_plan(validate(p), {.engine = Engine::cpu});
  const bool folds = folded.forward.fold_axis >= 0;
  EXPECT_EQ(plain.forward.fold_axis, -1);
  EXPECT_EQ(plain.backward.fold_axis, -1);
  EXPECT_EQ(plain.forward.work.tile_pairs > folded.forward.work.tile_pairs, folds);
  EXPECT_EQ(plain.backward.work.tile_pairs > folded.backward.work.tile_pairs, folds);
}

}  // namespace
}  // namespace vicus
