#include "vicus/problem.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "core/checks.h"
#include "vicus/error.h"
#include "vicus/geometry.h"

namespace vicus {
namespace {

constexpr std::int64_t kMaxHeads = 1 << 20;
constexpr std::int64_t kMaxHeadDim = 1 << 16;
constexpr std::int64_t kMaxBatch = std::int64_t{1} << 40;

std::string at(const char* name, std::size_t index) { return std::string(name) + "[" + std::to_string(index) + "]"; }

void require_range(const std::string& name, std::int64_t got, std::int64_t least, std::int64_t most) {
  if (got >= least && got <= most) return;
  throw InvalidArgument(name, std::to_string(got), std::to_string(least) + " to " + std::to_string(most));
}

AxisValues per_axis(const AxisValues& values, const char* name, int rank) {
  if (values.size() != 1 && values.size() != rank) {
    throw InvalidArgument(name, values.text(), "one value, or one per token axis: " + std::to_string(rank));
  }
  std::array<std::int64_t, 3> all{};
  for (int i = 0; i < rank; ++i) all[static_cast<std::size_t>(i)] = values[i];
  return AxisValues(std::span(all.data(), static_cast<std::size_t>(rank)));
}

void check_neighborhood(Neighborhood& mask, const Problem& problem) {
  const int rank = problem.rank();
  mask.kernel_size = per_axis(mask.kernel_size, "kernel_size", rank);
  mask.stride = per_axis(mask.stride, "stride", rank);
  mask.dilation = per_axis(mask.dilation, "dilation", rank);
  mask.is_causal = per_axis(mask.is_causal, "is_causal", rank);
  for (int i = 0; i < rank; ++i) {
    const auto n = static_cast<std::size_t>(i);
    require_range(at("kernel_size", n), mask.kernel_size[i], 1, geometry::kMaxLen);
    require_range(at("dilation", n), mask.dilation[i], 1, geometry::kMaxLen);
    require_range(at("is_causal", n), mask.is_causal[i], 0, 1);
    if (mask.stride[i] < 1 || mask.stride[i] > mask.kernel_size[i]) {
      throw InvalidArgument(at("stride", n), std::to_string(mask.stride[i]),
                            "1 to kernel_size, " + std::to_string(mask.kernel_size[i]));
    }
  }
  if (problem.attn_bias)
    throw InvalidArgument("attn_bias", "given", "dense attention only; neighborhood attention has rpb");
}

void check_cumulative(const std::vector<std::int64_t>& list, const char* name, std::int64_t total) {
  if (list.empty() || list.front() != 0) {
    throw InvalidArgument(at(name, 0), list.empty() ? "missing" : std::to_string(list.front()), "0");
  }
  for (std::size_t i = 1; i < list.size(); ++i) {
    if (list[i] < list[i - 1]) {
      throw InvalidArgument(at(name, i), std::to_string(list[i]),
                            ">= " + at(name, i - 1) + ", " + std::to_string(list[i - 1]));
    }
  }
  if (list.back() != total) {
    throw InvalidArgument(at(name, list.size() - 1), std::to_string(list.back()),
                          "the number of tokens, " + std::to_string(total));
  }
}

void check_device_lengths(const Dense& mask, const Problem& problem) {
  const DeviceLengths& of = mask.device;
  require_range("device.sequences", of.sequences, 0, geometry::kMaxLen);
  if (of.any() && !(mask.cumulative_queries.empty() && mask.cumulative_keys.empty() && mask.key_lengths.empty())) {
    throw InvalidArgument("device", "given", "without cumulative_queries, cumulative_keys and key_lengths");
  }
  const bool packed = of.sequences > 0;
  require_range("device.max_queries", of.max_queries, 0, packed ? problem.layout[0] : 0);
  require_range("device.max_keys", of.max_keys, 0, packed ? mask.keys : 0);
  if (packed && of.key_lengths) throw InvalidArgument("device.key_lengths", "true", "false with packed sequences");
}

void check_dense(const Dense& mask, const Problem& problem) {
  if (problem.rank() != 1) throw InvalidArgument("layout", problem.layout.text(), "one axis (Sq) for dense attention");
  require_range("keys", mask.keys, 0, geometry::kMaxLen);
  require_range("window_left", mask.window_left, -1, geometry::kMaxLen);
  require_range("window_right", mask.window_right, -1, geometry::kMaxLen);
  if (mask.causal != Causal::none && mask.window_right > 0) {
    throw InvalidArgument("window_right", std::to_string(mask.window_right), "-1 or 0 with a causal mask");
  }
  if (problem.rpb) throw InvalidArgument("rpb", "given", "neighborhood attention only; dense attention has attn_bias");
  check_device_lengths(mask, problem);
  if (mask.packed() || !mask.cumulative_keys.empty()) {
    if (problem.batch != 1) throw InvalidArgument("batch", std::to_string(problem.batch), "1 with packed sequences");
    if (problem.attn_bias) throw InvalidArgument("attn_bias", "given", "absent with packed sequences");
  }
  if (!mask.cumulative_queries.empty() || !mask.cumulative_keys.empty()) {
    check_cumulative(mask.cumulative_queries, "cumulative_queries", problem.layout[0]);
    check_cumulative(mask.cumulative_keys, "cumulative_keys", mask.keys);
    if (mask.cumulative_queries.size() != mask.cumulative_keys.size()) {
      throw InvalidArgument("cumulative_keys", std::to_string(mask.cumulative_keys.size()) + " values",
                            "as many as cumulative_queries: " + std::to_string(mask.cumulative_queries.size()));
    }
    if (!mask.key_lengths.empty()) throw InvalidArgument("key_lengths", "given", "absent with packed sequences");
  }
  if (!mask.key_lengths.empty()) {
    if (static_cast<std::int64_t>(mask.key_lengths.size()) != problem.batch) {
      throw InvalidArgument("key_lengths", std::to_string(mask.key_lengths.size()) + " values",
                            "one per batch entry: " + std::to_string(problem.batch));
    }
    for (std::size_t i = 0; i < mask.key_lengths.size(); ++i) {
      require_range(at("key_lengths", i), mask.key_lengths[i], 0, mask.keys);
    }
  }
}

// Every tensor must be addressable, also where an extent is zero.
void check_size(const Problem& p) {
  std::int64_t tokens = 1;
  bool fits = true;
  for (int i = 0; i < p.rank(); ++i) {
    fits = fits && !__builtin_mul_overflow(tokens, std::max<std::int64_t>(p.layout[i], 1), &tokens);
  }
  if (const auto* dense = std::get_if<Dense>(&p.mask)) tokens = std::max(tokens, dense->keys);
  tokens = std::max(tokens, p.additional_tokens);
  for (const std::int64_t extent : {p.batch, p.heads, std::max(p.head_dim, p.head_dim_v)}) {
    fits = fits && !__builtin_mul_overflow(tokens, std::max<std::int64_t>(extent, 1), &tokens);
  }
  if (!fits) throw InvalidArgument("layout", p.layout.text(), "tensors of fewer than 2^63 elements");
}

std::vector<std::int64_t> token_shape(const Problem& p, bool of_keys, std::initializer_list<std::int64_t> tail) {
  std::vector<std::int64_t> shape = {p.batch};
  if (of_keys && p.dense()) {
    shape.push_back(p.keys());
  } else {
    for (int i = 0; i < p.rank(); ++i) shape.push_back(p.layout[i]);
  }
  shape.insert(shape.end(), tail);
  return shape;
}

// Shapes that both kinds of problem read off their tensors. The axes of key and value are compared by the calls.
Problem problem_of(const ConstTensorView& query, const ConstTensorView& key, const ConstTensorView& value,
                   const ConstTensorView& additional_keys, std::optional<double> scale) {
  require_present("query", query);
  require_present("key", key);
  require_present("value", value);
  if (query.dims() < 4 || query.dims() > kMaxDims) {
    throw InvalidArgument("query.shape", shape_text(query), "[batch, 1 to 3 token axes, heads, head_dim]");
  }
  for (const auto& [name, tensor] : {std::pair{"key", key}, std::pair{"value", value}}) {
    if (tensor.dims() != query.dims()) {
      throw InvalidArgument(std::string(name) + ".shape", shape_text(tensor),
                            "as many dimensions as query: " + std::to_string(query.dims()));
    }
  }
  const int dims = query.dims();
  Problem p;
  p.dtype = query.dtype();
  p.batch = query.size(0);
  p.layout = AxisValues(query.shape().subspan(1, static_cast<std::size_t>(dims) - 3));
  p.heads = query.size(dims - 2);
  p.heads_kv = key.size(dims - 2);
  p.head_dim = query.size(dims - 1);
  p.head_dim_v = value.size(dims - 1);
  require_range("key.shape[" + std::to_string(dims - 2) + "]", p.heads_kv, 1, kMaxHeads);
  require_range("value.shape[" + std::to_string(dims - 1) + "]", p.head_dim_v, 1, kMaxHeadDim);
  p.scale = scale;
  if (additional_keys) {
    if (additional_keys.dims() != 4) {
      throw InvalidArgument("additional_keys.shape", shape_text(additional_keys),
                            "[batch, tokens, heads_kv, head_dim]");
    }
    p.additional_tokens = additional_keys.size(1);
  }
  return p;
}

}  // namespace

AxisValues::AxisValues(std::span<const std::int64_t> values) : size_(static_cast<int>(values.size())) {
  if (values.size() > value_.size()) {
    throw InvalidArgument("per-axis argument", std::to_string(values.size()) + " values",
                          "at most 3, one per token axis");
  }
  for (std::size_t i = 0; i < values.size(); ++i) value_[i] = values[i];
}

std::string AxisValues::text() const {
  std::ostringstream out;
  out << '(';
  for (int i = 0; i < size_; ++i) out << (i ? ", " : "") << value_[static_cast<std::size_t>(i)];
  out << ')';
  return out.str();
}

std::int64_t Problem::queries() const noexcept {
  std::int64_t n = 1;
  for (int i = 0; i < rank(); ++i) n *= layout[i];
  return n;
}

std::int64_t Problem::keys() const noexcept { return dense() ? std::get<Dense>(mask).keys : queries(); }

double Problem::effective_scale() const noexcept {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(head_dim));
}

std::vector<std::int64_t> Problem::query_shape() const { return token_shape(*this, false, {heads, head_dim}); }
std::vector<std::int64_t> Problem::key_shape() const { return token_shape(*this, true, {heads_kv, head_dim}); }
std::vector<std::int64_t> Problem::value_shape() const { return token_shape(*this, true, {heads_kv, head_dim_v}); }
std::vector<std::int64_t> Problem::output_shape() const { return token_shape(*this, false, {heads, head_dim_v}); }
std::vector<std::int64_t> Problem::logsumexp_shape() const { return token_shape(*this, false, {heads}); }
std::vector<std::int64_t> Problem::additional_keys_shape() const {
  return {batch, additional_tokens, heads_kv, head_dim};
}
std::vector<std::int64_t> Problem::additional_values_shape() const {
  return {batch, additional_tokens, heads_kv, head_dim_v};
}
std::vector<std::int64_t> Problem::rpb_shape() const {
  if (dense()) throw InvalidArgument("rpb", "asked for", "neighborhood attention only");
  std::vector<std::int64_t> shape = {heads};
  const auto& window = std::get<Neighborhood>(mask).kernel_size;
  for (int i = 0; i < rank(); ++i) shape.push_back(2 * window[i] - 1);
  return shape;
}

Problem validate(Problem p) {
  if (p.layout.size() < 1) throw InvalidArgument("layout", "()", "one to three token axes");
  require_range("batch", p.batch, 0, kMaxBatch);
  for (int i = 0; i < p.rank(); ++i) {
    require_range(at("layout", static_cast<std::size_t>(i)), p.layout[i], 0, geometry::kMaxLen);
  }
  require_range("heads", p.heads, 1, kMaxHeads);
  if (p.heads_kv == 0) p.heads_kv = p.heads;
  if (p.heads_kv < 1 || p.heads % p.heads_kv != 0) {
    throw InvalidArgument("heads_kv", std::to_string(p.heads_kv), "a divisor of heads, " + std::to_string(p.heads));
  }
  require_range("head_dim", p.head_dim, 1, kMaxHeadDim);
  if (p.head_dim_v == 0) p.head_dim_v = p.head_dim;
  require_range("head_dim_v", p.head_dim_v, 1, kMaxHeadDim);
  if (p.scale) {
    const double most =
        p.dtype == DType::float64 ? std::numeric_limits<double>::max() / 2 : std::numeric_limits<float>::max() / 2;
    if (!(std::abs(*p.scale) <= most)) {
      throw InvalidArgument("scale", std::to_string(*p.scale), "a finite number of the type that is computed in");
    }
  }
  require_range("additional_tokens", p.additional_tokens, 0, geometry::kMaxLen);
  if (auto* neighborhood = std::get_if<Neighborhood>(&p.mask)) {
    check_neighborhood(*neighborhood, p);
  } else {
    check_dense(std::get<Dense>(p.mask), p);
  }
  check_size(p);
  return p;
}

Problem neighborhood_problem(const ConstTensorView& query, const ConstTensorView& key, const ConstTensorView& value,
                             const Neighborhood& mask, std::optional<double> scale,
                             const ConstTensorView& additional_keys, const ConstTensorView& rpb) {
  Problem p = problem_of(query, key, value, additional_keys, scale);
  p.mask = mask;
  p.rpb = rpb.present();
  return validate(std::move(p));
}

Problem dense_problem(const ConstTensorView& query, const ConstTensorView& key, const ConstTensorView& value,
                      Dense mask, std::optional<double> scale, const ConstTensorView& additional_keys,
                      const ConstTensorView& attn_bias) {
  Problem p = problem_of(query, key, value, additional_keys, scale);
  if (query.dims() != 4) throw InvalidArgument("query.shape", shape_text(query), "[batch, tokens, heads, head_dim]");
  mask.keys = key.size(1);
  p.mask = std::move(mask);
  p.attn_bias = attn_bias.present();
  return validate(std::move(p));
}

}  // namespace vicus
