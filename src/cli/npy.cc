#include "cli/npy.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <string>
#include <string_view>

namespace vicus::cli {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr std::size_t kMaxHeader = 65536;  // NumPy's own limit for files it does not trust is 10000
constexpr std::size_t kMaxAxes = 64;       // NumPy's limit
constexpr std::size_t kAlignment = 64;

struct Header {
  std::string_view descr;
  bool fortran_order = false;
  std::vector<std::int64_t> shape;
};

/// Reads the one dictionary that the format allows: {'descr': '...', 'fortran_order': True|False, 'shape': (...)}.
class HeaderParser {
 public:
  explicit HeaderParser(std::string_view text) : rest_(text) {}

  Header parse() {
    Header header;
    bool descr = false, order = false, shape = false;
    expect('{');
    while (!accept('}')) {
      const std::string_view key = quoted();
      expect(':');
      if (key == "descr" && !descr) {
        descr = true;
        if (peek() == '[') throw FormatError("holds records of several fields, not numbers of one type");
        header.descr = quoted();
      } else if (key == "fortran_order" && !order) {
        order = true;
        header.fortran_order = boolean();
      } else if (key == "shape" && !shape) {
        shape = true;
        header.shape = tuple();
      } else {
        malformed();
      }
      if (!accept(',') && peek() != '}') malformed();
    }
    if (!descr || !order || !shape || peek() != '\0') malformed();
    return header;
  }

 private:
  [[noreturn]] static void malformed() {
    throw FormatError("has a malformed header: expected {'descr': ..., 'fortran_order': ..., 'shape': ...}");
  }
  /// Next character that is no white space; '\0' at the end.
  char peek() {
    rest_.remove_prefix(std::min(rest_.find_first_not_of(" \n"), rest_.size()));
    if (!rest_.empty() && rest_.front() == '\0') malformed();
    return rest_.empty() ? '\0' : rest_.front();
  }
  bool accept(char c) {
    if (peek() != c) return false;
    rest_.remove_prefix(1);
    return true;
  }
  void expect(char c) {
    if (!accept(c)) malformed();
  }
  bool accept_word(std::string_view word) {
    peek();
    if (!rest_.starts_with(word)) return false;
    rest_.remove_prefix(word.size());
    return true;
  }
  std::string_view quoted() {
    const char quote = peek();
    if (quote != '\'' && quote != '"') malformed();
    rest_.remove_prefix(1);
    const std::size_t end = rest_.find(quote);
    if (end == std::string_view::npos) malformed();
    const std::string_view text = rest_.substr(0, end);
    if (text.find_first_of("\\\n") != std::string_view::npos) malformed();
    rest_.remove_prefix(end + 1);
    return text;
  }
  bool boolean() {
    if (accept_word("True")) return true;
    if (!accept_word("False")) malformed();
    return false;
  }
  std::int64_t integer() {
    peek();
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
    if (error == std::errc::result_out_of_range) throw FormatError("has a shape that does not fit into 63 bits");
    if (error != std::errc() || value < 0) malformed();
    rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
    return value;
  }
  std::vector<std::int64_t> tuple() {
    std::vector<std::int64_t> values;
    bool comma = true;
    expect('(');
    while (!accept(')')) {
      if (!comma) malformed();
      values.push_back(integer());
      if (values.size() > kMaxAxes) throw FormatError("has more than 64 axes");
      comma = accept(',');
    }
    if (values.size() == 1 && !comma) malformed();  // "(3)" is a number in Python
    return values;
  }

  std::string_view rest_;
};

DType dtype_of(std::string_view descr, bool void_is_bfloat16) {
  const std::string name(descr);
  if (descr == "<f4") return DType::float32;
  if (descr == "<f8") return DType::float64;
  if (descr == "<f2") return DType::float16;
  if (descr == "<V2" || descr == "|V2") {
    if (void_is_bfloat16) return DType::bfloat16;
    throw FormatError("holds two-byte elements without a type ('" + name +
                      "'); give --dtype bfloat16 if they are bfloat16");
  }
  if (descr.starts_with('>')) throw FormatError("is big-endian ('" + name + "'); little-endian is needed");
  throw FormatError("holds elements of type '" + name + "'; float32, float64, float16 or bfloat16 is needed");
}

std::string_view descr_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "<f4";
    case DType::float64:
      return "<f8";
    case DType::float16:
      return "<f2";
    case DType::bfloat16:
      return "<V2";
  }
  return "";
}

}  // namespace

bool is_npy(std::span<const std::byte> bytes) {
  return bytes.size() >= kMagic.size() && std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) == 0;
}

FileArray parse_npy(std::span<const std::byte> bytes, bool void_is_bfloat16) {
  if (!is_npy(bytes)) throw FormatError("does not begin as a .npy file does");
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  std::size_t at = kMagic.size() + 2;
  if (text.size() < at) throw FormatError("ends inside its header");
  const int major = static_cast<unsigned char>(text[kMagic.size()]);
  if (major < 1 || major > 3) throw FormatError("has .npy version " + std::to_string(major) + "; 1, 2 and 3 are known");
  const std::size_t length_bytes = major == 1 ? 2 : 4;
  if (text.size() - at < length_bytes) throw FormatError("ends inside its header");
  std::size_t length = 0;
  for (std::size_t i = length_bytes; i-- > 0;) length = length << 8 | static_cast<unsigned char>(text[at + i]);
  at += length_bytes;
  if (length > kMaxHeader)
    throw FormatError("has a header of " + std::to_string(length) + " bytes; at most 65536 are read");
  if (length > text.size() - at) throw FormatError("ends inside its header");

  Header header = HeaderParser(text.substr(at, length)).parse();
  at += length;
  FileArray array;
  array.dtype = dtype_of(header.descr, void_is_bfloat16);
  array.shape = std::move(header.shape);
  array.fortran_order = header.fortran_order;
  array.data = bytes.subspan(at);
  const auto count = checked_count(array.shape);
  const auto size = count ? checked_bytes(*count, dtype_size(array.dtype)) : std::nullopt;
  if (!size) throw FormatError("has a shape that does not fit into 63 bits");
  if (*size != array.data.size()) {
    throw FormatError("has " + std::to_string(array.data.size()) + " bytes of elements where its shape needs " +
                      std::to_string(*size));
  }
  return array;
}

std::vector<std::byte> npy_header(DType dtype, std::span<const std::int64_t> shape) {
  std::string text = "{'descr': '" + std::string(descr_of(dtype)) + "', 'fortran_order': False, 'shape': (";
  for (const std::int64_t extent : shape) text += std::to_string(extent) + ", ";
  if (shape.size() > 1) text.resize(text.size() - 2);
  if (shape.size() == 1) text.pop_back();
  text += "), }";
  const std::size_t before = kMagic.size() + 4;
  text.append((kAlignment - (before + text.size() + 1) % kAlignment) % kAlignment, ' ');
  text += '\n';
  std::string all(kMagic);
  all += {'\1', '\0', static_cast<char>(text.size() & 0xff), static_cast<char>(text.size() >> 8)};
  all += text;
  const auto* first = reinterpret_cast<const std::byte*>(all.data());
  return {first, first + all.size()};
}

}  // namespace vicus::cli
