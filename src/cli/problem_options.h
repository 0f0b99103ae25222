// The options that say what is to be computed: the mask for attend, plan and profile; shapes for plan and profile, which
// have no arrays to take them from. The library checks the values; here only what belongs together is checked.
#ifndef VICUS_CLI_PROBLEM_OPTIONS_H_
#define VICUS_CLI_PROBLEM_OPTIONS_H_

#include <CLI/App.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "vicus/plan.h"
#include "vicus/problem.h"

namespace vicus::cli {

struct MaskOptions {
  std::vector<std::int64_t> kernel_size, stride, dilation;
  bool dense = false;
  std::optional<std::vector<std::string>> causal;  ///< empty list: the bare option
  std::optional<std::int64_t> window_left, window_right;
  std::vector<std::int64_t> key_lengths, cumulative_queries, cumulative_keys;
  std::optional<double> scale;
};

struct ShapeOptions {
  std::vector<std::int64_t> layout;
  std::optional<std::int64_t> keys;
  std::int64_t batch = 1, heads = 1, heads_kv = 0, head_dim = 64, head_dim_v = 0, additional_tokens = 0;
  std::string dtype = "float32";
  bool rpb = false, attn_bias = false;
};

struct EngineOptions {
  std::string engine = "auto";
  int threads = 0;
};

/// Adds the options to `command`; the struct must outlive it.
void add_mask_options(CLI::App& command, MaskOptions& options);
void add_shape_options(CLI::App& command, ShapeOptions& options);
void add_engine_options(CLI::App& command, EngineOptions& options);

/// The mask asked for. `keys` of a dense mask is left to the caller. Throws InvalidArgument where options contradict.
[[nodiscard]] std::variant<Neighborhood, Dense> make_mask(const MaskOptions& options);

[[nodiscard]] Problem make_problem(const ShapeOptions& shape, const MaskOptions& mask);
[[nodiscard]] PlanOptions make_plan_options(const EngineOptions& options);

}  // namespace vicus::cli

#endif  // VICUS_CLI_PROBLEM_OPTIONS_H_
