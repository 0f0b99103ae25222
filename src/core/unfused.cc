// The unfused operators: checks, and calls of an engine.
#include "vicus/unfused.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "core/checks.h"
#include "core/unfused.h"
#include "vicus/error.h"

namespace vicus {
namespace {

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

void check_additional(const char* name, const Problem& p, const ConstTensorView& t) {
  if (t) require_input(name, t, std::vector{p.batch, p.heads_kv, p.additional_tokens, p.head_dim}, p.dtype);
}

const UnfusedEngine& engine_of(Engine engine) {
  switch (engine) {
    case Engine::automatic:
    case Engine::cpu:
      return cpu::kUnfused;
    case Engine::sm80:
    case Engine::sm90:
      return gpu::kUnfused;
    default:
      throw Unsupported("engine " + std::string(engine_name(engine)) + " has no unfused operators; cpu and sm80 have");
  }
}

}  // namespace

Slots::Slots(const Problem& problem) {
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

std::int64_t score_slots(const Problem& problem) { return Slots(problem).window_slots + problem.additional_tokens; }

void qk_forward(const Neighborhood& mask, const ConstTensorView& query, const ConstTensorView& key,
                const TensorView& scores, const ConstTensorView& additional_keys, const ConstTensorView& rpb,
                Engine engine, void* stream) {
  const UnfusedEngine& run = engine_of(engine);
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
  const UnfusedStep step = ScoreRows{heads_last(query),           heads_last(key),
                                     heads_last(additional_keys), rpb,
                                     heads_last(scores),          -std::numeric_limits<double>::infinity()};
  run.run(p, {&step, 1}, stream);
}

void qk_backward(const Neighborhood& mask, const ConstTensorView& query, const ConstTensorView& key,
                 const ConstTensorView& grad_scores, const QkGradients& gradients,
                 const ConstTensorView& additional_keys, Engine engine, void* stream) {
  const UnfusedEngine& run = engine_of(engine);
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
  const ConstTensorView queries = heads_last(query);
  std::vector<UnfusedStep> steps;
  const auto add = [&](ScoreSums::Of of, const ConstTensorView& rows, const TensorView& out) {
    if (out) steps.emplace_back(ScoreSums{of, grads, rows, heads_last(additional_keys), out});
  };
  add(ScoreSums::queries, heads_last(key), heads_last(gradients.query));
  add(ScoreSums::keys, queries, heads_last(gradients.key));
  add(ScoreSums::additional_tokens, queries, heads_last(gradients.additional_keys));
  add(ScoreSums::rpb, {}, gradients.rpb);
  run.run(p, steps, stream);
}

void av_forward(const Neighborhood& mask, const ConstTensorView& scores, const ConstTensorView& value,
                const TensorView& output, const ConstTensorView& additional_values, Engine engine, void* stream) {
  const UnfusedEngine& run = engine_of(engine);
  const Problem p = unfused_problem("scores", scores, "value", value, mask, "additional_values", additional_values);
  require_input("scores", scores, heads_first_shape(p, p.heads, score_slots(p)), p.dtype);
  require_input("value", value, heads_first_shape(p, p.heads_kv, p.head_dim), p.dtype);
  check_additional("additional_values", p, additional_values);
  require_output("output", output, heads_first_shape(p, p.heads, p.head_dim), p.dtype);
  const UnfusedStep step = ScoreSums{ScoreSums::queries, heads_last(scores), heads_last(value),
                                     heads_last(additional_values), heads_last(output)};
  run.run(p, {&step, 1}, stream);
}

void av_backward(const Neighborhood& mask, const ConstTensorView& scores, const ConstTensorView& value,
                 const ConstTensorView& grad_output, const AvGradients& gradients,
                 const ConstTensorView& additional_values, Engine engine, void* stream) {
  const UnfusedEngine& run = engine_of(engine);
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
  const ConstTensorView weights = heads_last(scores), rows = heads_last(grad_output);
  std::vector<UnfusedStep> steps;
  if (gradients.scores) {
    steps.emplace_back(
        ScoreRows{rows, heads_last(value), heads_last(additional_values), {}, heads_last(gradients.scores), 0.0});
  }
  const auto add = [&](ScoreSums::Of of, const TensorView& out) {
    if (out) steps.emplace_back(ScoreSums{of, weights, rows, {}, out});
  };
  add(ScoreSums::keys, heads_last(gradients.value));
  add(ScoreSums::additional_tokens, heads_last(gradients.additional_values));
  run.run(p, steps, stream);
}

}  // namespace vicus
