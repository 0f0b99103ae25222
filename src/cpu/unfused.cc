// The unfused operators: loops over windows from geometry.h around the two list primitives. Scores go through memory by
// definition, so these are bound by it; every output row has one owner, and sums run in one order.
#include "vicus/unfused.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "core/checks.h"
#include "core/domain.h"
#include "core/elements.h"
#include "core/numbers.h"
#include "cpu/layout.h"
#include "cpu/lists.h"
#include "cpu/parallel.h"
#include "vicus/error.h"

namespace vicus {
namespace {

using geometry::Box;
using geometry::Span;

// [B, H, *X, D] seen as [B, *X, H, D], the order that row_map knows.
TensorLayout heads_last(const TensorLayout& t) {
  std::vector<std::int64_t> shape = {t.size(0)}, strides = {t.stride(0)};
  for (int i = 2; i < t.dims() - 1; ++i) {
    shape.push_back(t.size(i));
    strides.push_back(t.stride(i));
  }
  for (const int i : {1, t.dims() - 1}) {
    shape.push_back(t.size(i));
    strides.push_back(t.stride(i));
  }
  return {shape, strides};
}

template <class Pointer>
BasicTensorView<Pointer> heads_last(const BasicTensorView<Pointer>& t) {
  if (!t) return {};
  return {t.data(), t.dtype(), heads_last(static_cast<const TensorLayout&>(t))};
}

std::vector<std::int64_t> heads_first_shape(const Problem& p, std::int64_t heads, std::int64_t width) {
  std::vector<std::int64_t> shape = {p.batch, heads};
  for (int i = 0; i < p.rank(); ++i) shape.push_back(p.layout[i]);
  shape.push_back(width);
  return shape;
}

// The problem of heads-first tensors; `rows` [B, H, *X, ...] gives batch, heads and layout.
Problem unfused_problem(const char* name, const ConstTensorView& rows, const char* keys_name,
                        const ConstTensorView& keys, const Neighborhood& mask, const char* additional_name,
                        const ConstTensorView& additional) {
  for (const auto& [what, t] : {std::pair{name, rows}, std::pair{keys_name, keys}}) {
    require_present(what, t);
    if (t.dims() < 4 || t.dims() != rows.dims()) {
      throw InvalidArgument(std::string(what) + ".shape", shape_text(t), "[batch, heads, 1 to 3 token axes, features]");
    }
  }
  Problem p;
  p.dtype = rows.dtype();
  p.batch = rows.size(0);
  p.heads = rows.size(1);
  p.heads_kv = keys.size(1);
  p.layout = AxisValues(rows.shape().subspan(2, static_cast<std::size_t>(rows.dims()) - 3));
  p.head_dim = p.head_dim_v = keys.size(keys.dims() - 1);
  if (p.heads_kv < 1) throw InvalidArgument(std::string(keys_name) + ".shape[1]", "0", ">= 1");
  if (additional) {
    if (additional.dims() != 4) {
      throw InvalidArgument(std::string(additional_name) + ".shape", shape_text(additional),
                            "[batch, heads, tokens, features]");
    }
    p.additional_tokens = additional.size(2);
  }
  p.mask = mask;
  return validate(std::move(p));
}

// One query of one head, and what it is paired with.
struct Slots {
  explicit Slots(const Problem& problem) {
    if (problem.dense())
      throw InvalidArgument("problem", "dense", "neighborhood attention: scores have a slot per window key");
    const auto& window = std::get<Neighborhood>(problem.mask).kernel_size;
    for (int i = 0; i < problem.rank(); ++i)
      extent[static_cast<std::size_t>(geometry::kRank - problem.rank() + i)] = window[i];
    std::int64_t slots = problem.additional_tokens;  // with the other dimensions of the scores
    bool fits = !__builtin_mul_overflow(extent[0], extent[1], &window_slots) &&
                !__builtin_mul_overflow(window_slots, extent[2], &window_slots) &&
                !__builtin_add_overflow(slots, window_slots, &slots);
    for (const std::int64_t factor : {problem.batch, problem.heads, problem.queries()}) {
      fits = fits && !__builtin_mul_overflow(slots, std::max<std::int64_t>(factor, 1), &slots);
    }
    if (!fits) throw InvalidArgument("kernel_size", window.text(), "scores of fewer than 2^63 elements");
  }

  // Slot of the key at `k` in the window that begins at `begin`.
  [[nodiscard]] std::int64_t slot(const Position& k, const Position& begin) const {
    return ((k[0] - begin[0]) * extent[1] + k[1] - begin[1]) * extent[2] + k[2] - begin[2];
  }

  std::array<std::int64_t, 3> extent{1, 1, 1};
  std::int64_t window_slots = 1;
};

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
      : double_weights(p.dtype == DType::float64),
        sums(cpu::round_up(static_cast<std::size_t>(width), cpu::kPad) * 8) {}

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
    cpu::sum_list(dtype, rows.data(), weights(), count(), width, sums.data(), out);
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
  cpu::parallel_tasks(cpu::max_threads(), domain.size() * heads * kSlices, 0, [&](std::int64_t task, std::byte*) {
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

// Dot products of a query row with all its keys, into the slots of `scores`: qk forward, and dA of av backward.
// `unused` fills the slots without a key.
struct ScoreRows {
  ConstTensorView rows, keys, additional, rpb;  // heads last, but rpb
  TensorView scores;
  double unused;
};

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
    cpu::dot_list(p.dtype, element(s.rows, row_map(s.rows, p, cell, 0).row(q, head)), lists.rows.data(), lists.count(),
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
  cpu::parallel_tasks(cpu::max_threads(), p.batch * p.heads_kv * tokens, 0, [&](std::int64_t task, std::byte*) {
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
  cpu::parallel_tasks(cpu::max_threads(), p.heads, 0, [&](std::int64_t head, std::byte*) {
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

void check_additional(const char* name, const Problem& p, const ConstTensorView& t) {
  if (t) require_input(name, t, std::vector{p.batch, p.heads_kv, p.additional_tokens, p.head_dim}, p.dtype);
}

}  // namespace

std::int64_t score_slots(const Problem& problem) { return Slots(problem).window_slots + problem.additional_tokens; }

void qk_forward(const Neighborhood& mask, const ConstTensorView& query, const ConstTensorView& key,
                const TensorView& scores, const ConstTensorView& additional_keys, const ConstTensorView& rpb) {
  Problem p = unfused_problem("query", query, "key", key, mask, "additional_keys", additional_keys);
  require_input("query", query, heads_first_shape(p, p.heads, p.head_dim), p.dtype);
  require_input("key", key, heads_first_shape(p, p.heads_kv, p.head_dim), p.dtype);
  check_additional("additional_keys", p, additional_keys);
  if (rpb) {
    p.rpb = true;
    require_shape("rpb", rpb, p.rpb_shape());
    require_dtype("rpb", rpb, std::array{p.dtype, DType::float32, DType::float64});
  }
  require_output("scores", scores, heads_first_shape(p, p.heads, score_slots(p)), p.dtype);
  write_scores(p, {heads_last(query), heads_last(key), heads_last(additional_keys), rpb, heads_last(scores),
                   -std::numeric_limits<double>::infinity()});
}

void qk_backward(const Neighborhood& mask, const ConstTensorView& query, const ConstTensorView& key,
                 const ConstTensorView& grad_scores, const QkGradients& gradients,
                 const ConstTensorView& additional_keys) {
  Problem p = unfused_problem("query", query, "key", key, mask, "additional_keys", additional_keys);
  require_input("query", query, heads_first_shape(p, p.heads, p.head_dim), p.dtype);
  require_input("key", key, heads_first_shape(p, p.heads_kv, p.head_dim), p.dtype);
  check_additional("additional_keys", p, additional_keys);
  require_input("grad_scores", grad_scores, heads_first_shape(p, p.heads, score_slots(p)), p.dtype);
  if (gradients.query) require_output("grad_query", gradients.query, query.shape(), p.dtype);
  if (gradients.key) require_output("grad_key", gradients.key, key.shape(), p.dtype);
  if (gradients.additional_keys) {
    require_present("additional_keys", additional_keys);
    require_output("grad_additional_keys", gradients.additional_keys, additional_keys.shape(), p.dtype);
  }
  if (gradients.rpb) {
    require_shape("grad_rpb", gradients.rpb, p.rpb_shape());
    require_dtype("grad_rpb", gradients.rpb, std::array{p.dtype, DType::float32, DType::float64});
    require_distinct("grad_rpb", gradients.rpb);
  }
  const ConstTensorView grads = heads_last(grad_scores);
  if (gradients.query) {
    sum_to_queries(p, grads, heads_last(key), heads_last(additional_keys), heads_last(gradients.query));
  }
  if (gradients.key) sum_to_keys(p, grads, heads_last(query), heads_last(gradients.key));
  if (gradients.additional_keys) {
    sum_to_additional(p, grads, heads_last(query), heads_last(gradients.additional_keys));
  }
  if (gradients.rpb) sum_to_rpb(p, grads, gradients.rpb);
}

void av_forward(const Neighborhood& mask, const ConstTensorView& scores, const ConstTensorView& value,
                const TensorView& output, const ConstTensorView& additional_values) {
  const Problem p = unfused_problem("scores", scores, "value", value, mask, "additional_values", additional_values);
  require_input("scores", scores, heads_first_shape(p, p.heads, score_slots(p)), p.dtype);
  require_input("value", value, heads_first_shape(p, p.heads_kv, p.head_dim), p.dtype);
  check_additional("additional_values", p, additional_values);
  require_output("output", output, heads_first_shape(p, p.heads, p.head_dim), p.dtype);
  sum_to_queries(p, heads_last(scores), heads_last(value), heads_last(additional_values), heads_last(output));
}

void av_backward(const Neighborhood& mask, const ConstTensorView& scores, const ConstTensorView& value,
                 const ConstTensorView& grad_output, const AvGradients& gradients,
                 const ConstTensorView& additional_values) {
  const Problem p = unfused_problem("scores", scores, "value", value, mask, "additional_values", additional_values);
  require_input("scores", scores, heads_first_shape(p, p.heads, score_slots(p)), p.dtype);
  require_input("value", value, heads_first_shape(p, p.heads_kv, p.head_dim), p.dtype);
  check_additional("additional_values", p, additional_values);
  require_input("grad_output", grad_output, heads_first_shape(p, p.heads, p.head_dim), p.dtype);
  if (gradients.scores) require_output("grad_scores", gradients.scores, scores.shape(), p.dtype);
  if (gradients.value) require_output("grad_value", gradients.value, value.shape(), p.dtype);
  if (gradients.additional_values) {
    require_present("additional_values", additional_values);
    require_output("grad_additional_values", gradients.additional_values, additional_values.shape(), p.dtype);
  }
  if (gradients.scores) {
    write_scores(p, {heads_last(grad_output),
                     heads_last(value),
                     heads_last(additional_values),
                     {},
                     heads_last(gradients.scores),
                     0.0});
  }
  if (gradients.value) sum_to_keys(p, heads_last(scores), heads_last(grad_output), heads_last(gradients.value));
  if (gradients.additional_values) {
    sum_to_additional(p, heads_last(scores), heads_last(grad_output), heads_last(gradients.additional_values));
  }
}

}  // namespace vicus
