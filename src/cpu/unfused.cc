// The unfused operators: loops over windows from geometry.h around the two list primitives. Scores go through memory by
// definition, so these are bound by it; every output row has one owner, and sums run in one order.
#include "core/unfused.h"

#include <vector>

#include "core/domain.h"
#include "core/elements.h"
#include "core/numbers.h"
#include "cpu/layout.h"
#include "cpu/lists.h"
#include "cpu/parallel.h"

namespace vicus::cpu {
namespace {

using geometry::Box;
using geometry::Span;

Box window_of(const Cell& cell, const Position& q) {
  return {{geometry::window(cell.grid.axis[0], q[0]), geometry::window(cell.grid.axis[1], q[1]),
           geometry::window(cell.grid.axis[2], q[2])}};
}

Position begin_of(const Box& box) { return {box.axis[0].begin, box.axis[1].begin, box.axis[2].begin}; }

template <class Visit>
void for_each_position(const Box& box, const Visit& visit) {
  for (int i = box.axis[0].begin; i < box.axis[0].end; ++i) {
    for (int j = box.axis[1].begin; j < box.axis[1].end; ++j) {
      for (int k = box.axis[2].begin; k < box.axis[2].end; ++k) visit(Position{i, j, k});
    }
  }
}

const void* element(const ConstTensorView& t, std::int64_t offset) {
  return static_cast<const std::byte*>(t.data()) + offset * static_cast<std::int64_t>(dtype_size(t.dtype()));
}
void* element(const TensorView& t, std::int64_t offset) {
  return static_cast<std::byte*>(t.data()) + offset * static_cast<std::int64_t>(dtype_size(t.dtype()));
}

// Growing lists of one task: rows and their weights.
struct Lists {
  explicit Lists(const Problem& p, std::int64_t width)
      : double_weights(p.dtype == DType::float64), sums(round_up(static_cast<std::size_t>(width), kPad) * 8) {}

  void clear() {
    rows.clear();
    float_weight.clear();
    double_weight.clear();
  }
  void add(const void* row, double weight) {
    rows.push_back(row);
    if (double_weights) double_weight.push_back(weight);
    else float_weight.push_back(static_cast<float>(weight));
  }
  [[nodiscard]] int count() const { return static_cast<int>(rows.size()); }
  [[nodiscard]] const void* weights() const {
    return double_weights ? static_cast<const void*>(double_weight.data()) : float_weight.data();
  }
  void* results() {  // of dot_list
    if (double_weights) double_weight.resize(rows.size());
    else float_weight.resize(rows.size());
    return double_weights ? static_cast<void*>(double_weight.data()) : float_weight.data();
  }
  [[nodiscard]] double result(std::size_t i) const {
    return double_weights ? double_weight[i] : static_cast<double>(float_weight[i]);
  }
  void sum(DType dtype, int width, void* out) {
    sum_list(dtype, rows.data(), weights(), count(), width, sums.data(), out);
  }

  bool double_weights;
  std::vector<const void*> rows;
  std::vector<float> float_weight;
  std::vector<double> double_weight;
  std::vector<std::byte> sums;
};

// Calls `each(lists, cell, head, position)` for every position of every cell and head in parallel; positions are those
// of the queries, which are also those of the keys. A task is a slice of one head along the longest axis.
template <class Each>
void for_each_row(const Problem& p, std::int64_t heads, std::int64_t width, const Each& each) {
  constexpr int kSlices = 16;
  const Domain domain(p);
  parallel_tasks(max_threads(), domain.size() * heads * kSlices, 0, [&](std::int64_t task, std::byte*) {
    const Cell cell = domain.cell(task / kSlices / heads);
    Box slice = {{{0, cell.grid.axis[0].queries}, {0, cell.grid.axis[1].queries}, {0, cell.grid.axis[2].queries}}};
    Span* longest = &slice.axis[2];
    for (Span& axis : slice.axis) {
      if (axis.size() > longest->size()) longest = &axis;
    }
    *longest =
        geometry::tile_span(static_cast<int>(task % kSlices), geometry::ceil_div(longest->end, kSlices), longest->end);
    Lists lists(p, width);
    for_each_position(slice, [&](const Position& q) { each(lists, cell, task / kSlices % heads, q); });
  });
}

void write_scores(const Problem& p, const ScoreRows& s) {
  const Slots slots(p);
  const std::int64_t group = p.heads / p.heads_kv;
  const RpbMap rpb = p.rpb ? rpb_map(s.rpb, p) : RpbMap{};
  const int width = static_cast<int>(s.keys.size(s.keys.dims() - 1));
  for_each_row(p, p.heads, width, [&](Lists& lists, const Cell& cell, std::int64_t head, const Position& q) {
    const std::int64_t out = row_map(s.scores, p, cell, 0).row(q, head);
    const auto put = [&](std::int64_t slot, double x) {
      store_element(s.scores.data(), s.scores.dtype(), out + slot, x);
    };
    const RowMap key_map = row_map(s.keys, p, cell, 0);
    const Box window = window_of(cell, q);
    lists.clear();
    for_each_position(window, [&](const Position& k) { lists.add(element(s.keys, key_map.row(k, head / group)), 0); });
    for (int t = 0; t < p.additional_tokens; ++t) {
      lists.add(element(s.additional, additional_row_map(s.additional, cell.batch).row({0, 0, t}, head / group)), 0);
    }
    dot_list(p.dtype, element(s.rows, row_map(s.rows, p, cell, 0).row(q, head)), lists.rows.data(), lists.count(),
             width, lists.results());
    if (window.volume() < slots.window_slots) {
      for (std::int64_t slot = 0; slot < slots.window_slots; ++slot) put(slot, s.unused);
    }
    std::size_t i = 0;
    for_each_position(window, [&](const Position& k) {
      double x = lists.result(i++);
      if (p.rpb) x += load_element(s.rpb.data(), s.rpb.dtype(), head * s.rpb.stride(0) + rpb.offset(k, q));
      put(slots.slot(k, begin_of(window)), x);
    });
    for (int t = 0; t < p.additional_tokens; ++t) put(slots.window_slots + t, lists.result(i++));
  });
}

// Sums of key rows by the scores of a query: av forward, and dq of qk backward.
void sum_to_queries(const Problem& p, const ConstTensorView& scores, const ConstTensorView& keys,
                    const ConstTensorView& additional, const TensorView& out) {
  const Slots slots(p);
  const std::int64_t group = p.heads / p.heads_kv;
  const int width = static_cast<int>(keys.size(keys.dims() - 1));
  for_each_row(p, p.heads, width, [&](Lists& lists, const Cell& cell, std::int64_t head, const Position& q) {
    const std::int64_t from = row_map(scores, p, cell, 0).row(q, head);
    const auto weight = [&](std::int64_t slot) { return load_element(scores.data(), scores.dtype(), from + slot); };
    const RowMap key_map = row_map(keys, p, cell, 0);
    const Box window = window_of(cell, q);
    lists.clear();
    for_each_position(window, [&](const Position& k) {
      lists.add(element(keys, key_map.row(k, head / group)), weight(slots.slot(k, begin_of(window))));
    });
    for (int t = 0; t < p.additional_tokens; ++t) {
      lists.add(element(additional, additional_row_map(additional, cell.batch).row({0, 0, t}, head / group)),
                weight(slots.window_slots + t));
    }
    lists.sum(p.dtype, width, element(out, row_map(out, p, cell, 0).row(q, head)));
  });
}

// Sums of query rows by the scores a key has with them: dk of qk backward, and dv of av backward.
void sum_to_keys(const Problem& p, const ConstTensorView& scores, const ConstTensorView& rows, const TensorView& out) {
  const Slots slots(p);
  const std::int64_t group = p.heads / p.heads_kv;
  const int width = static_cast<int>(rows.size(rows.dims() - 1));
  for_each_row(p, p.heads_kv, width, [&](Lists& lists, const Cell& cell, std::int64_t kv_head, const Position& k) {
    const Box key = {{{k[0], k[0] + 1}, {k[1], k[1] + 1}, {k[2], k[2] + 1}}};
    const RowMap row = row_map(rows, p, cell, 0);
    const RowMap score = row_map(scores, p, cell, 0);
    lists.clear();
    for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for_each_position(geometry::queries_of(cell.grid, key), [&](const Position& q) {
        const std::int64_t slot = slots.slot(k, begin_of(window_of(cell, q)));
        lists.add(element(rows, row.row(q, head)),
                  load_element(scores.data(), scores.dtype(), score.row(q, head) + slot));
      });
    }
    lists.sum(p.dtype, width, element(out, row_map(out, p, cell, 0).row(k, kv_head)));
  });
}

// The same for the additional tokens, which every query of the batch entry sees.
void sum_to_additional(const Problem& p, const ConstTensorView& scores, const ConstTensorView& rows,
                       const TensorView& out) {
  const Slots slots(p);
  const Domain domain(p);
  const std::int64_t group = p.heads / p.heads_kv;
  const int width = static_cast<int>(rows.size(rows.dims() - 1));
  const std::int64_t tokens = p.additional_tokens;
  parallel_tasks(max_threads(), p.batch * p.heads_kv * tokens, 0, [&](std::int64_t task, std::byte*) {
    const std::int64_t token = task % tokens, kv_head = task / tokens % p.heads_kv, batch = task / tokens / p.heads_kv;
    Lists lists(p, width);
    const auto [first, last] = domain.cells_of(batch);
    for (std::int64_t i = first; i < last; ++i) {
      const Cell cell = domain.cell(i);
      const RowMap row = row_map(rows, p, cell, 0);
      const RowMap score = row_map(scores, p, cell, 0);
      const Box all = {
          {{0, cell.grid.axis[0].queries}, {0, cell.grid.axis[1].queries}, {0, cell.grid.axis[2].queries}}};
      for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for_each_position(all, [&](const Position& q) {
          lists.add(element(rows, row.row(q, head)),
                    load_element(scores.data(), scores.dtype(), score.row(q, head) + slots.window_slots + token));
        });
      }
    }
    lists.sum(p.dtype, width,
              element(out, additional_row_map(out, batch).row({0, 0, static_cast<int>(token)}, kv_head)));
  });
}

// Gradient of rpb: one task per head, summed in float64.
void sum_to_rpb(const Problem& p, const ConstTensorView& scores, const TensorView& out) {
  const Slots slots(p);
  const Domain domain(p);
  const TensorLayout table(p.rpb_shape());
  const RpbMap map = rpb_map(table, p);
  parallel_tasks(max_threads(), p.heads, 0, [&](std::int64_t head, std::byte*) {
    std::vector<double> sums(static_cast<std::size_t>(table.stride(0)), 0.0);
    for (std::int64_t i = 0; i < domain.size(); ++i) {
      const Cell cell = domain.cell(i);
      const RowMap score = row_map(scores, p, cell, 0);
      const Box all = {
          {{0, cell.grid.axis[0].queries}, {0, cell.grid.axis[1].queries}, {0, cell.grid.axis[2].queries}}};
      for_each_position(all, [&](const Position& q) {
        const Box window = window_of(cell, q);
        for_each_position(window, [&](const Position& k) {
          sums[static_cast<std::size_t>(map.offset(k, q))] +=
              load_element(scores.data(), scores.dtype(), score.row(q, head) + slots.slot(k, begin_of(window)));
        });
      });
    }
    for_each_element(first_slice(out), [&](std::int64_t i, std::int64_t offset) {
      store_element(out.data(), out.dtype(), head * out.stride(0) + offset, sums[static_cast<std::size_t>(i)]);
    });
  });
}

void sum(const Problem& p, const ScoreSums& s) {
  switch (s.of) {
    case ScoreSums::queries:
      return sum_to_queries(p, s.scores, s.rows, s.additional, s.out);
    case ScoreSums::keys:
      return sum_to_keys(p, s.scores, s.rows, s.out);
    case ScoreSums::additional_tokens:
      return sum_to_additional(p, s.scores, s.rows, s.out);
    case ScoreSums::rpb:
      return sum_to_rpb(p, s.scores, s.out);
  }
}

void run(const Problem& p, std::span<const UnfusedStep> steps, void* /*stream*/) {
  for (const UnfusedStep& step : steps) {
    if (const auto* rows = std::get_if<ScoreRows>(&step)) write_scores(p, *rows);
    else sum(p, std::get<ScoreSums>(step));
  }
}

}  // namespace

const UnfusedEngine kUnfused = {run};

}  // namespace vicus::cpu
