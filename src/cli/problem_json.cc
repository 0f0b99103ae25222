#include "cli/problem_json.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <utility>

#include "cli/format.h"
#include "vicus/error.h"

namespace vicus::cli {
namespace {

using Json = nlohmann::ordered_json;

/// A value for a message, short whatever it is.
std::string shown(const Json& value) {
  constexpr std::size_t kMost = 40;
  if (value.is_structured()) return value.is_object() ? "an object" : "a list of " + std::to_string(value.size());
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > kMost) text.replace(kMost, std::string::npos, "...");
  return text;
}

std::int64_t integer(const Json& value, const std::string& name) {
  const bool fits = value.is_number_integer() &&
                    (!value.is_number_unsigned() ||
                     value.get<std::uint64_t>() <= std::uint64_t{std::numeric_limits<std::int64_t>::max()});
  if (!fits) throw InvalidArgument(name, shown(value), "an integer");
  return value.get<std::int64_t>();
}

std::vector<std::int64_t> integers(const Json& value, const std::string& name) {
  if (!value.is_array()) throw InvalidArgument(name, shown(value), "a list of integers");
  std::vector<std::int64_t> list;
  for (const Json& each : value) list.push_back(integer(each, name + "[" + std::to_string(list.size()) + "]"));
  return list;
}

bool boolean(const Json& value, const std::string& name) {
  if (!value.is_boolean()) throw InvalidArgument(name, shown(value), "true or false");
  return value.get<bool>();
}

void require_object(const Json& value, const std::string& name) {
  if (!value.is_object()) throw InvalidArgument(name, shown(value), "an object");
}

/// The fields of one object, each asked for by name; `finish` refuses the rest.
class Fields {
 public:
  /// `name` is the object's in messages, `prefix` comes before the fields'.
  Fields(const Json& object, const std::string& name, std::string prefix)
      : object_(object), prefix_(std::move(prefix)) {
    require_object(object, name);
  }

  [[nodiscard]] std::string name_of(const std::string& field) const { return prefix_ + field; }

  /// Null where it is left out.
  const Json* find(const std::string& field) {
    known_.insert(field);
    const auto found = object_.find(field);
    return found == object_.end() ? nullptr : &*found;
  }
  const Json& need(const std::string& field, const std::string& allowed) {
    const Json* const found = find(field);
    if (found == nullptr) throw InvalidArgument(name_of(field), "missing", allowed);
    return *found;
  }
  void read(const std::string& field, std::int64_t& value) {
    if (const Json* const found = find(field)) value = integer(*found, name_of(field));
  }
  void read(const std::string& field, bool& value) {
    if (const Json* const found = find(field)) value = boolean(*found, name_of(field));
  }
  void read(const std::string& field, std::vector<std::int64_t>& list) {
    if (const Json* const found = find(field)) list = integers(*found, name_of(field));
  }
  /// One integer for all axes, or one for each.
  void read(const std::string& field, AxisValues& values) {
    const Json* const found = find(field);
    if (found == nullptr) return;
    if (!found->is_array()) {
      values = integer(*found, name_of(field));
    } else if (const auto list = integers(*found, name_of(field)); list.size() <= 3) {
      values = AxisValues(std::span(list));
    } else {
      throw InvalidArgument(name_of(field), "a list of " + std::to_string(list.size()), "1 to 3 integers");
    }
  }
  void finish() const {
    for (const auto& [field, value] : object_.items()) {
      if (known_.contains(field)) continue;
      std::string allowed;
      for (const std::string& each : known_) allowed += (allowed.empty() ? "" : ", ") + each;
      throw InvalidArgument(name_of(field), "unknown", allowed);
    }
  }

 private:
  const Json& object_;
  std::string prefix_;
  std::set<std::string> known_;
};

template <class T, std::size_t kCount>
T one_of(const Json& value, const std::string& name, const std::array<std::pair<const char*, T>, kCount>& words) {
  std::string allowed;
  for (const auto& [word, meaning] : words) {
    if (value == word) return meaning;
    allowed += (allowed.empty() ? "" : ", ") + std::string(word);
  }
  throw InvalidArgument(name, shown(value), allowed);
}

DeviceLengths read_device(const Json& value) {
  Fields fields(value, "mask.device", "mask.device.");
  DeviceLengths lengths;
  fields.read("sequences", lengths.sequences);
  fields.read("max_queries", lengths.max_queries);
  fields.read("max_keys", lengths.max_keys);
  fields.read("key_lengths", lengths.key_lengths);
  fields.finish();
  return lengths;
}

std::variant<Neighborhood, Dense> read_mask(const Json& object) {
  Fields fields(object, "mask", "mask.");
  const bool dense = one_of(
      fields.need("kind", "neighborhood, dense"), "mask.kind",
      std::array{std::pair<const char*, bool>("neighborhood", false), std::pair<const char*, bool>("dense", true)});
  if (!dense) {
    Neighborhood mask;
    fields.need("kernel_size", "1 to 3 integers");
    fields.read("kernel_size", mask.kernel_size);
    fields.read("stride", mask.stride);
    fields.read("dilation", mask.dilation);
    fields.read("is_causal", mask.is_causal);
    fields.finish();
    return mask;
  }
  Dense mask;
  fields.need("keys", "an integer");
  fields.read("keys", mask.keys);
  if (const Json* const causal = fields.find("causal")) {
    using Word = std::pair<const char*, Causal>;
    mask.causal = one_of(*causal, "mask.causal",
                         std::array{Word("none", Causal::none), Word("top-left", Causal::top_left),
                                    Word("bottom-right", Causal::bottom_right)});
  }
  fields.read("window_left", mask.window_left);
  fields.read("window_right", mask.window_right);
  fields.read("key_lengths", mask.key_lengths);
  fields.read("cumulative_queries", mask.cumulative_queries);
  fields.read("cumulative_keys", mask.cumulative_keys);
  if (const Json* const device = fields.find("device")) mask.device = read_device(*device);
  fields.finish();
  return mask;
}

Problem read_problem(const Json& value) {
  require_object(value, "problem");
  const auto inner = value.find("problem");
  const Json& object = inner == value.end() ? value : *inner;
  Fields fields(object, "problem", "");
  Problem problem;
  if (const Json* const dtype = fields.find("dtype")) {
    problem.dtype = parse_dtype(dtype->is_string() ? dtype->get_ref<const std::string&>() : shown(*dtype));
  }
  fields.read("batch", problem.batch);
  fields.need("layout", "1 to 3 integers");
  fields.read("layout", problem.layout);
  fields.read("heads", problem.heads);
  fields.read("heads_kv", problem.heads_kv);
  fields.read("head_dim", problem.head_dim);
  fields.read("head_dim_v", problem.head_dim_v);
  if (const Json* const scale = fields.find("scale"); scale != nullptr && !scale->is_null()) {
    if (!scale->is_number()) throw InvalidArgument("scale", shown(*scale), "a number, or null");
    problem.scale = scale->get<double>();
  }
  fields.read("additional_tokens", problem.additional_tokens);
  fields.read("rpb", problem.rpb);
  fields.read("attn_bias", problem.attn_bias);
  problem.mask = read_mask(fields.need("mask", "an object"));
  fields.finish();
  return validate(std::move(problem));
}

/// Lines of `text` up to `end`, the first being 1.
std::size_t line_at(std::string_view text, std::size_t end) {
  return 1 + static_cast<std::size_t>(std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(end), '\n'));
}

}  // namespace

std::vector<PlacedProblem> parse_problems(std::string_view text, const std::string& name) {
  std::vector<PlacedProblem> problems;
  const auto add = [&](const Json& value, const std::string& place) {
    try {
      problems.push_back({read_problem(value), place});
    } catch (const InvalidArgument& error) {
      throw error.within(place, ": ");
    }
  };
  std::istringstream in{std::string(text)};
  while ((in >> std::ws).peek() != std::istringstream::traits_type::eof()) {
    const auto start = static_cast<std::size_t>(in.tellg());
    const std::string place = name + ", line " + std::to_string(line_at(text, start));
    Json value;
    try {
      in >> value;
    } catch (const Json::exception& error) {
      std::size_t at = start;
      if (const auto* const wrong = dynamic_cast<const Json::parse_error*>(&error)) at += wrong->byte;
      throw FormatError(name + ", line " + std::to_string(line_at(text, std::min(at, text.size()))) +
                        ": no JSON: " + error.what());
    }
    if (!value.is_array()) {
      add(value, place);
      continue;
    }
    for (std::size_t i = 0; i < value.size(); ++i) add(value[i], place + ", problem " + std::to_string(i + 1));
  }
  if (problems.empty()) throw FormatError(name + ": holds no problem");
  return problems;
}

}  // namespace vicus::cli
