#include "cli/safetensors.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <string_view>
#include <tuple>
#include <unordered_set>
#include <utility>

namespace vicus::cli {
namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeader = 100'000'000;  // the format's own limit
constexpr std::size_t kMaxAxes = 64;
constexpr std::string_view kMetadata = "__metadata__";

/// Types whose size is known, with the bytes of one element.
constexpr std::array<std::pair<std::string_view, std::uint64_t>, 16> kTypeSizes = {{{"BOOL", 1},
                                                                                    {"U8", 1},
                                                                                    {"I8", 1},
                                                                                    {"F8_E5M2", 1},
                                                                                    {"F8_E4M3", 1},
                                                                                    {"F8_E8M0", 1},
                                                                                    {"U16", 2},
                                                                                    {"I16", 2},
                                                                                    {"F16", 2},
                                                                                    {"BF16", 2},
                                                                                    {"U32", 4},
                                                                                    {"I32", 4},
                                                                                    {"F32", 4},
                                                                                    {"U64", 8},
                                                                                    {"I64", 8},
                                                                                    {"F64", 8}}};

constexpr std::array<std::pair<std::string_view, DType>, 4> kOperandTypes = {
    {{"F32", DType::float32}, {"F64", DType::float64}, {"F16", DType::float16}, {"BF16", DType::bfloat16}}};

[[noreturn]] void malformed(const std::string& why) { throw FormatError("has a malformed header: " + why); }

struct RawEntry {
  std::string name, type;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;
};

/// Receives the header's JSON piece by piece, and stops at the first piece that is out of place: no document is built, so
/// memory stays below that of the text.
class HeaderHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::vector<RawEntry> entries;

  bool null() override { out_of_place("null"); }
  bool boolean(bool) override { out_of_place("a boolean"); }
  bool number_integer(number_integer_t) override { out_of_place("a negative number"); }
  bool number_float(number_float_t, const string_t&) override { out_of_place("a number that is no integer"); }
  bool binary(binary_t&) override { out_of_place("binary data"); }
  bool number_unsigned(number_unsigned_t value) override {
    if (where_ == Where::shape) {
      if (value > static_cast<number_unsigned_t>(INT64_MAX)) malformed("a shape does not fit into 63 bits");
      if (entries.back().shape.size() >= kMaxAxes) malformed("more than 64 axes");
      entries.back().shape.push_back(static_cast<std::int64_t>(value));
    } else if (where_ == Where::offsets && offsets_ < 2) {
      (offsets_++ == 0 ? entries.back().begin : entries.back().end) = value;
    } else {
      out_of_place("a number");
    }
    return true;
  }
  bool string(string_t& value) override {
    if (where_ == Where::dtype) {
      entries.back().type = value;
      where_ = Where::entry;
    } else if (where_ != Where::metadata_value) {
      out_of_place("a text");
    } else {
      where_ = Where::metadata;
    }
    return true;
  }
  bool start_object(std::size_t) override {
    if (where_ == Where::start) where_ = Where::top;
    else if (where_ == Where::entry_value) where_ = Where::entry;
    else if (where_ == Where::metadata_start) where_ = Where::metadata;
    else out_of_place("an object");
    return true;
  }
  bool key(string_t& name) override {
    if (where_ == Where::top) {
      if (!names_.insert(name).second) malformed("the name '" + name + "' comes twice");
      if (name == kMetadata) {
        where_ = Where::metadata_start;
      } else {
        where_ = Where::entry_value;
        entries.emplace_back().name = name;
        dtype_ = shape_ = data_offsets_ = false;
      }
    } else if (where_ == Where::metadata) {
      where_ = Where::metadata_value;
    } else if (name == "dtype" && !std::exchange(dtype_, true)) {
      where_ = Where::dtype;
    } else if (name == "shape" && !std::exchange(shape_, true)) {
      where_ = Where::shape_start;
    } else if (name == "data_offsets" && !std::exchange(data_offsets_, true)) {
      where_ = Where::offsets_start;
      offsets_ = 0;
    } else {
      malformed("'" + name + "' is out of place");
    }
    return true;
  }
  bool end_object() override {
    if (where_ == Where::entry && (!dtype_ || !shape_ || !data_offsets_)) {
      malformed("'" + entries.back().name + "' lacks dtype, shape or data_offsets");
    }
    where_ = where_ == Where::top ? Where::start : Where::top;
    return true;
  }
  bool start_array(std::size_t) override {
    if (where_ == Where::shape_start) where_ = Where::shape;
    else if (where_ == Where::offsets_start) where_ = Where::offsets;
    else out_of_place("a list");
    return true;
  }
  bool end_array() override {
    if (where_ == Where::offsets && offsets_ != 2) malformed("data_offsets holds fewer than two numbers");
    where_ = Where::entry;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    malformed("no JSON at byte " + std::to_string(position));
  }

 private:
  enum class Where {
    start,
    top,
    metadata_start,
    metadata,
    metadata_value,
    entry_value,
    entry,
    dtype,
    shape_start,
    shape,
    offsets_start,
    offsets
  };
  [[noreturn]] static void out_of_place(const std::string& what) { malformed(what + " is out of place"); }

  Where where_ = Where::start;
  bool dtype_ = false, shape_ = false, data_offsets_ = false;
  int offsets_ = 0;
  std::unordered_set<std::string> names_;
};

template <class Table>
auto find_in(const Table& table, std::string_view name) -> std::optional<decltype(table[0].second)> {
  for (const auto& [key, value] : table) {
    if (key == name) return value;
  }
  return std::nullopt;
}

/// One tensor whose data begins where the one before it ended.
SafetensorsEntry resolve(RawEntry raw, std::span<const std::byte> data, std::uint64_t expected_begin) {
  const std::string quoted = "'" + raw.name + "'";
  if (raw.begin > raw.end || raw.end > data.size()) {
    throw FormatError("has data of " + quoted + " outside of the file: bytes " + std::to_string(raw.begin) + " to " +
                      std::to_string(raw.end) + " of " + std::to_string(data.size()));
  }
  if (raw.begin != expected_begin) throw FormatError("has data of " + quoted + " that overlap others or leave a gap");
  const auto count = checked_count(raw.shape);
  if (!count) throw FormatError("has a shape of " + quoted + " that does not fit into 63 bits");
  if (const auto element = find_in(kTypeSizes, raw.type)) {
    const auto size = checked_bytes(*count, *element);
    if (!size || *size != raw.end - raw.begin) {
      throw FormatError("has " + std::to_string(raw.end - raw.begin) + " bytes for " + quoted +
                        ", which is not what its shape and type need");
    }
  }
  SafetensorsEntry entry;
  entry.dtype = find_in(kOperandTypes, raw.type);
  entry.data = data.subspan(raw.begin, raw.end - raw.begin);
  entry.name = std::move(raw.name);
  entry.type = std::move(raw.type);
  entry.shape = std::move(raw.shape);
  return entry;
}

}  // namespace

std::vector<SafetensorsEntry> parse_safetensors(std::span<const std::byte> bytes) {
  if (bytes.size() < kLengthBytes) throw FormatError("is too short to be a safetensors file");
  std::uint64_t length = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;) length = length << 8 | std::to_integer<std::uint64_t>(bytes[i]);
  if (length > kMaxHeader || length > bytes.size() - kLengthBytes) {
    throw FormatError("is no safetensors file, or ends inside its header");
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, length);
  if (!text.starts_with('{')) malformed("it does not begin with '{'");
  HeaderHandler handler;
  nlohmann::json::sax_parse(text, &handler);

  const std::span<const std::byte> data = bytes.subspan(kLengthBytes + length);
  std::sort(handler.entries.begin(), handler.entries.end(), [](const RawEntry& a, const RawEntry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  std::vector<SafetensorsEntry> entries;
  entries.reserve(handler.entries.size());
  std::uint64_t end = 0;
  for (RawEntry& raw : handler.entries) {
    const std::uint64_t next = raw.end;
    entries.push_back(resolve(std::move(raw), data, end));
    end = next;
  }
  if (end != data.size()) throw FormatError("has " + std::to_string(data.size() - end) + " bytes that no tensor owns");
  return entries;
}

bool valid_tensor_name(const std::string& name) {
  if (name.empty() || name == kMetadata) return false;
  try {
    (void)nlohmann::json(name).dump();
  } catch (const nlohmann::json::exception&) {
    return false;
  }
  return true;
}

std::vector<std::byte> safetensors_header(std::vector<TensorToWrite>& tensors) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorToWrite& a, const TensorToWrite& b) {
    return std::pair(dtype_size(b.dtype), a.name) < std::pair(dtype_size(a.dtype), b.name);
  });
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  std::size_t at = 0;
  for (const TensorToWrite& tensor : tensors) {
    std::string_view type;
    for (const auto& [name, dtype] : kOperandTypes) {
      if (dtype == tensor.dtype) type = name;
    }
    header[tensor.name] = {{"dtype", type}, {"shape", tensor.shape}, {"data_offsets", {at, at + tensor.data.size()}}};
    at += tensor.data.size();
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  std::vector<std::byte> bytes;
  bytes.reserve(kLengthBytes + text.size());
  for (std::size_t i = 0; i < kLengthBytes; ++i) bytes.push_back(static_cast<std::byte>(text.size() >> (8 * i) & 0xff));
  for (const char c : text) bytes.push_back(static_cast<std::byte>(c));
  return bytes;
}

}  // namespace vicus::cli
