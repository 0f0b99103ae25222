#include "cli/problem_options.h"

#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <span>

#include "cli/validators.h"
#include "vicus/error.h"

namespace vicus::cli {
namespace {

constexpr int kMaxThreads = 4096;

AxisValues axis_values(const std::vector<std::int64_t>& values, const AxisValues& otherwise) {
  return values.empty() ? otherwise : AxisValues(std::span(values));
}

AxisValues neighborhood_causal(const std::optional<std::vector<std::string>>& causal) {
  if (!causal) return 0;
  if (causal->empty()) return 1;
  std::vector<std::int64_t> flags;
  for (const std::string& word : *causal) {
    if (word != "0" && word != "1") {
      throw InvalidArgument("--causal", "'" + word + "'", "nothing (all axes), or 0 or 1 for each axis of --layout");
    }
    flags.push_back(word == "1");
  }
  return AxisValues(std::span<const std::int64_t>(flags));
}

Causal dense_causal(const std::optional<std::vector<std::string>>& causal) {
  if (!causal) return Causal::none;
  const std::string word = causal->size() == 1 ? causal->front() : "";
  if (word == "top-left") return Causal::top_left;
  if (word == "bottom-right") return Causal::bottom_right;
  throw InvalidArgument("--causal", causal->empty() ? "without a value" : "'" + causal->front() + "'",
                        "top-left (key j <= query i) or bottom-right (key j <= query i + Sk - Sq) with --dense");
}

Dense dense_mask(const MaskOptions& options) {
  for (const auto& [name, values] :
       {std::pair("--stride", &options.stride), std::pair("--dilation", &options.dilation)}) {
    if (!values->empty()) throw InvalidArgument(name, "given with --dense", "with --kernel-size only");
  }
  Dense mask;
  mask.causal = dense_causal(options.causal);
  mask.window_left = options.window_left.value_or(-1);
  mask.window_right = options.window_right.value_or(-1);
  mask.key_lengths = options.key_lengths;
  mask.cumulative_queries = options.cumulative_queries;
  mask.cumulative_keys = options.cumulative_keys;
  return mask;
}

Neighborhood neighborhood_mask(const MaskOptions& options) {
  const std::pair<const char*, bool> dense_only[] = {{"--window-left", options.window_left.has_value()},
                                                     {"--window-right", options.window_right.has_value()},
                                                     {"--key-lengths", !options.key_lengths.empty()},
                                                     {"--cumulative-queries", !options.cumulative_queries.empty()},
                                                     {"--cumulative-keys", !options.cumulative_keys.empty()}};
  for (const auto& [name, given] : dense_only) {
    if (given) throw InvalidArgument(name, "given with --kernel-size", "with --dense only");
  }
  Neighborhood mask;
  mask.kernel_size = axis_values(options.kernel_size, {});
  mask.stride = axis_values(options.stride, 1);
  mask.dilation = axis_values(options.dilation, 1);
  mask.is_causal = neighborhood_causal(options.causal);
  return mask;
}

}  // namespace

void add_mask_options(CLI::App& command, MaskOptions& options) {
  const char* const neighborhood = "Neighborhood mask (one value for all axes, or one for each)";
  const auto axes = [&](const std::string& name, std::vector<std::int64_t>& values, const std::string& help) {
    command.add_option(name, values, help)->expected(1, 3)->delimiter(',')->type_name("N ...")->group(neighborhood);
  };
  axes("--kernel-size", options.kernel_size, "Window: keys that a query sees along each axis");
  axes("--stride", options.stride, "Queries that share a window (1: every query has its own)");
  axes("--dilation", options.dilation, "Distance of the keys in a window (1: neighbors)");
  command
      .add_option_function<std::vector<std::string>>(
          "--causal",
          [&options](std::vector<std::string> words) {
            std::erase(words, "");
            options.causal = std::move(words);
          },
          "Hide keys after the query: on all axes, or 0 or 1 for each; with --dense top-left or bottom-right")
      ->expected(0, 3)
      ->delimiter(',')
      ->type_name("[...]")
      ->group(neighborhood);

  const char* const dense = "Dense mask";
  command.add_flag("--dense", options.dense, "Every query sees every key that no option below hides")->group(dense);
  const auto window = [&](const std::string& name, std::optional<std::int64_t>& value, const std::string& help) {
    command.add_option(name, value, help)->type_name("N")->group(dense);
  };
  window("--window-left", options.window_left, "Sliding window: keys seen to the left of the query (-1: all)");
  window("--window-right", options.window_right, "Sliding window: keys seen to the right of the query (-1: all)");
  const auto list = [&](const std::string& name, std::vector<std::int64_t>& values, const std::string& help) {
    command.add_option(name, values, help)->delimiter(',')->type_name("N")->group(dense);
  };
  list("--key-lengths", options.key_lengths, "Real keys of each batch entry; the rest is padding");
  list("--cumulative-queries", options.cumulative_queries, "Packed sequences: where each begins, then the total");
  list("--cumulative-keys", options.cumulative_keys, "The same for keys and values");

  command.add_option("--scale", options.scale, "Factor of query . key [1 / sqrt(head dimension)]")->type_name("X");
}

void add_shape_options(CLI::App& command, ShapeOptions& options) {
  const char* const group = "Shape";
  command.add_option("--layout", options.layout, "Tokens along each axis: 4096, or 56 56, or 16 28 28")
      ->required()
      ->expected(1, 3)
      ->delimiter(',')
      ->type_name("N ...")
      ->group(group);
  const auto count = [&](const std::string& name, std::int64_t& value, const std::string& help) {
    command.add_option(name, value, help)->type_name("N")->group(group);
  };
  command.add_option("--keys", options.keys, "Keys, with --dense [as many as queries]")->type_name("N")->group(group);
  count("--batch", options.batch, "Batch entries [1]");
  count("--heads", options.heads, "Query heads [1]");
  count("--heads-kv", options.heads_kv, "Key and value heads, a divisor of --heads [--heads]");
  count("--head-dim", options.head_dim, "Features of a query and a key [64]");
  count("--head-dim-v", options.head_dim_v, "Features of a value [--head-dim]");
  count("--additional-tokens", options.additional_tokens, "Extra keys that every query sees [0]");
  command.add_option("--dtype", options.dtype, "float32, float64, bfloat16 or float16 [float32]")
      ->type_name("NAME")
      ->group(group);
  command.add_flag("--rpb", options.rpb, "With a relative positional bias (neighborhood)")->group(group);
  command.add_flag("--attn-bias", options.attn_bias, "With an additive mask (dense)")->group(group);
}

void add_engine_options(CLI::App& command, EngineOptions& options) {
  const char* const group = "Engine";
  command
      .add_option(
          "--engine", options.engine,
          "auto (the CPU), cpu, sm80 or sm90 (the first NVIDIA GPU; sm90: Hopper) or reference (slow loops) [auto]")
      ->type_name("NAME")
      ->group(group);
  command.add_option("--threads", options.threads, "CPU threads [one for each core]")
      ->check(within(0, kMaxThreads))
      ->type_name("N")
      ->group(group);
}

std::variant<Neighborhood, Dense> make_mask(const MaskOptions& options) {
  if (options.dense) {
    if (!options.kernel_size.empty()) throw InvalidArgument("--kernel-size", "given with --dense", "one of the two");
    return dense_mask(options);
  }
  if (options.kernel_size.empty()) {
    throw InvalidArgument("--kernel-size", "missing", "a window for neighborhood attention, or --dense instead");
  }
  return neighborhood_mask(options);
}

Problem make_problem(const ShapeOptions& shape, const MaskOptions& mask) {
  Problem problem;
  problem.dtype = parse_dtype(shape.dtype, "--dtype");
  problem.batch = shape.batch;
  problem.layout = axis_values(shape.layout, {});
  problem.heads = shape.heads;
  problem.heads_kv = shape.heads_kv;
  problem.head_dim = shape.head_dim;
  problem.head_dim_v = shape.head_dim_v;
  problem.scale = mask.scale;
  problem.additional_tokens = shape.additional_tokens;
  problem.rpb = shape.rpb;
  problem.attn_bias = shape.attn_bias;
  problem.mask = make_mask(mask);
  if (auto* dense = std::get_if<Dense>(&problem.mask)) {
    dense->keys = shape.keys.value_or(shape.layout.size() == 1 ? shape.layout.front() : 0);
  } else if (shape.keys) {
    throw InvalidArgument("--keys", "given with --kernel-size", "with --dense only");
  }
  return validate(std::move(problem));
}

PlanOptions make_plan_options(const EngineOptions& options) {
  PlanOptions plan;
  plan.engine = parse_engine(options.engine, "--engine");
  plan.threads = options.threads;
  return plan;
}

}  // namespace vicus::cli
