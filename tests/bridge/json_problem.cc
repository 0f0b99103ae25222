#include "json_problem.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "cli/plan_json.h"

namespace vicus::bridge {
namespace {

AxisValues axis_values(const Json& json) {
  if (json.is_number()) return AxisValues(json.get<std::int64_t>());
  const auto values = json.get<std::vector<std::int64_t>>();
  return AxisValues(std::span<const std::int64_t>(values));
}

Causal causal_from(const std::string& name) {
  if (name == "none") return Causal::none;
  if (name == "top_left") return Causal::top_left;
  if (name == "bottom_right") return Causal::bottom_right;
  throw std::logic_error("causal is " + name);
}

// Calls `set(key, value)` for every member; a member it does not take is a misspelt test.
template <class Set>
void for_members(const Json& json, const Set& set) {
  for (const auto& [key, value] : json.items()) {
    if (!set(key, value)) throw std::logic_error("the bridge does not know the member " + key);
  }
}

std::vector<std::int64_t> values(const AxisValues& axes) {
  std::vector<std::int64_t> list;
  for (int i = 0; i < axes.size(); ++i) list.push_back(axes[i]);
  return list;
}

}  // namespace

Neighborhood neighborhood_from(const Json& json) {
  Neighborhood mask;
  for_members(json, [&](const std::string& key, const Json& value) {
    if (key == "kernel_size") mask.kernel_size = axis_values(value);
    else if (key == "stride") mask.stride = axis_values(value);
    else if (key == "dilation") mask.dilation = axis_values(value);
    else if (key == "is_causal") mask.is_causal = axis_values(value);
    else return false;
    return true;
  });
  return mask;
}

Dense dense_from(const Json& json) {
  Dense mask;
  for_members(json, [&](const std::string& key, const Json& value) {
    if (key == "keys") mask.keys = value;
    else if (key == "causal") mask.causal = causal_from(value);
    else if (key == "window_left") mask.window_left = value;
    else if (key == "window_right") mask.window_right = value;
    else if (key == "key_lengths") mask.key_lengths = value.get<std::vector<std::int64_t>>();
    else if (key == "cumulative_queries") mask.cumulative_queries = value.get<std::vector<std::int64_t>>();
    else if (key == "cumulative_keys") mask.cumulative_keys = value.get<std::vector<std::int64_t>>();
    else return false;
    return true;
  });
  return mask;
}

Problem problem_from(const Json& json) {
  Problem problem;
  for_members(json, [&](const std::string& key, const Json& value) {
    if (key == "dtype") problem.dtype = parse_dtype(value.get<std::string>());
    else if (key == "batch") problem.batch = value;
    else if (key == "layout") problem.layout = axis_values(value);
    else if (key == "heads") problem.heads = value;
    else if (key == "heads_kv") problem.heads_kv = value;
    else if (key == "head_dim") problem.head_dim = value;
    else if (key == "head_dim_v") problem.head_dim_v = value;
    else if (key == "scale") problem.scale = value.is_null() ? std::optional<double>() : value.get<double>();
    else if (key == "additional_tokens") problem.additional_tokens = value;
    else if (key == "rpb") problem.rpb = value;
    else if (key == "attn_bias") problem.attn_bias = value;
    else if (key == "neighborhood") problem.mask = neighborhood_from(value);
    else if (key == "dense") problem.mask = dense_from(value);
    else return false;
    return true;
  });
  return problem;
}

PlanOptions options_from(const Json& json) {
  PlanOptions options;
  for_members(json, [&](const std::string& key, const Json& value) {
    if (key == "engine") options.engine = parse_engine(value.get<std::string>());
    else if (key == "threads") options.threads = value;
    else if (key == "tile_q") options.tile_q = value.get<std::array<int, 3>>();
    else if (key == "tile_kv") options.tile_kv = value.get<std::array<int, 3>>();
    else if (key == "rows") options.rows = value;
    else if (key == "gpu") options.gpu = {value.at(0), value.at(1), value.at(2), value.at(3)};
    else if (key == "deterministic") options.backward.deterministic = value;
    else return false;
    return true;
  });
  return options;
}

Json to_json(const Problem& problem) {
  Json json = {{"dtype", dtype_name(problem.dtype)},
               {"batch", problem.batch},
               {"layout", values(problem.layout)},
               {"heads", problem.heads},
               {"heads_kv", problem.heads_kv},
               {"head_dim", problem.head_dim},
               {"head_dim_v", problem.head_dim_v},
               {"scale", problem.effective_scale()},
               {"additional_tokens", problem.additional_tokens},
               {"rpb", problem.rpb},
               {"attn_bias", problem.attn_bias},
               {"queries", problem.queries()},
               {"keys", problem.keys()},
               {"shapes",
                {{"query", problem.query_shape()},
                 {"key", problem.key_shape()},
                 {"value", problem.value_shape()},
                 {"output", problem.output_shape()},
                 {"logsumexp", problem.logsumexp_shape()},
                 {"additional_keys", problem.additional_keys_shape()},
                 {"additional_values", problem.additional_values_shape()}}}};
  if (const auto* mask = std::get_if<Neighborhood>(&problem.mask)) {
    json["shapes"]["rpb"] = problem.rpb_shape();
    json["kernel_size"] = values(mask->kernel_size);
    json["stride"] = values(mask->stride);
    json["dilation"] = values(mask->dilation);
    json["is_causal"] = values(mask->is_causal);
  }
  return json;
}

Json to_json(const Plan& plan) {
  Json json = cli::to_json(plan);
  json["problem"] = to_json(plan.problem);
  json["text"] = describe(plan);
  return json;
}

TensorView view_of(const VicusBridgeTensor& tensor) {
  const auto dims = static_cast<std::size_t>(tensor.dims);
  return {tensor.data, parse_dtype(tensor.dtype), TensorLayout({tensor.shape, dims}, {tensor.strides, dims})};
}

}  // namespace vicus::bridge
