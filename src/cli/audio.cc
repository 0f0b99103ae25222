#include "cli/audio.h"

#include <sndfile.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>

#include "vicus/error.h"

namespace vicus::cli {
namespace {

/// A file in memory, as libsndfile's virtual files want it.
struct Memory {
  std::vector<std::byte> bytes;
  sf_count_t position = 0;

  [[nodiscard]] sf_count_t size() const { return static_cast<sf_count_t>(bytes.size()); }

  static Memory& of(void* self) { return *static_cast<Memory*>(self); }
  static sf_count_t length(void* self) { return of(self).size(); }
  static sf_count_t seek(sf_count_t offset, int whence, void* self) {
    Memory& m = of(self);
    const sf_count_t from = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? m.position : m.size();
    m.position = std::max<sf_count_t>(from + offset, 0);
    return m.position;
  }
  static sf_count_t read(void* to, sf_count_t count, void* self) {
    Memory& m = of(self);
    const sf_count_t n = std::clamp<sf_count_t>(m.size() - m.position, 0, count);
    if (n > 0) std::memcpy(to, m.bytes.data() + m.position, static_cast<std::size_t>(n));
    m.position += n;
    return n;
  }
  static sf_count_t write(const void* from, sf_count_t count, void* self) {
    Memory& m = of(self);
    if (m.position + count > m.size()) m.bytes.resize(static_cast<std::size_t>(m.position + count));
    std::memcpy(m.bytes.data() + m.position, from, static_cast<std::size_t>(count));
    m.position += count;
    return count;
  }
  static sf_count_t tell(void* self) { return of(self).position; }
};

using SoundFile = std::unique_ptr<SNDFILE, decltype(&sf_close)>;

SoundFile open(Memory& memory, int mode, SF_INFO& info) {
  SF_VIRTUAL_IO io{Memory::length, Memory::seek, Memory::read, Memory::write, Memory::tell};
  return {sf_open_virtual(&io, mode, &info, &memory), &sf_close};
}

/// The number that `field` is, spaces around it allowed.
std::optional<double> number(std::string_view field) {
  const std::size_t first = field.find_first_not_of(' ');
  if (first == std::string_view::npos) return std::nullopt;
  field = field.substr(first, field.find_last_not_of(' ') + 1 - first);
  if (field.starts_with('+')) field.remove_prefix(1);
  double value = 0;
  const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), value);
  if (error != std::errc() || end != field.data() + field.size()) return std::nullopt;
  return value;
}

}  // namespace

Sound decode_sound(const std::string& argument, const std::string& path, std::span<const std::byte> file) {
  Memory memory{{file.begin(), file.end()}};
  SF_INFO info{};
  const SoundFile handle = open(memory, SFM_READ, info);
  const auto refuse = [&](const std::string& why) {
    throw InvalidArgument(argument, "'" + path + "' (" + why + ")", "a sound file");
  };
  if (handle == nullptr) refuse(sf_strerror(nullptr));
  Sound sound{info.format, info.samplerate, info.channels, {}};
  // A header may promise any length: memory is asked for as samples arrive.
  const sf_count_t chunk = (1 << 16) / info.channels + 1;
  for (sf_count_t frames = 0;;) {
    sound.samples.resize(static_cast<std::size_t>((frames + chunk) * info.channels));
    const sf_count_t n = sf_readf_double(handle.get(), sound.samples.data() + frames * info.channels, chunk);
    frames += n;
    sound.samples.resize(static_cast<std::size_t>(frames * info.channels));
    if (n < chunk) break;
  }
  if (sf_error(handle.get()) != SF_ERR_NO_ERROR) refuse(sf_strerror(handle.get()));
  return sound;
}

std::vector<std::byte> encode_sound(const Sound& sound) {
  Memory memory;
  SF_INFO info{};
  info.format = sound.format;
  info.samplerate = sound.rate;
  info.channels = sound.channels;
  SoundFile handle = open(memory, SFM_WRITE, info);
  if (handle == nullptr) throw std::runtime_error(std::string("sound file: ") + sf_strerror(nullptr));
  sf_command(handle.get(), SFC_SET_CLIPPING, nullptr, SF_TRUE);
  const auto frames = static_cast<sf_count_t>(sound.samples.size()) / sound.channels;
  if (sf_writef_double(handle.get(), sound.samples.data(), frames) != frames) {
    throw std::runtime_error(std::string("sound file: ") + sf_strerror(handle.get()));
  }
  handle.reset();  // completes the header
  return std::move(memory.bytes);
}

Table::Table(const std::string& argument, const std::string& path, std::span<const std::byte> file)
    : argument_(argument), path_(path) {
  std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
  if (text.find('"') != std::string_view::npos) refuse("a quoted field");
  if (text.find('\0') != std::string_view::npos) refuse("not text");
  for (const char c : {'\t', ';', ','}) {
    if (text.find(c) == std::string_view::npos) continue;
    separator_ = c;
    break;
  }
  if (text.find("\r\n") != std::string_view::npos) line_end_ = "\r\n";
  ended_ = text.ends_with(line_end_);
  while (!text.empty()) {
    const std::size_t end = std::min(text.find(line_end_), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + line_end_.size(), text.size()));
    std::size_t fields = 0;
    for (bool more = true; more; ++fields) {
      const std::size_t cut = std::min(line.find(separator_), line.size());
      more = cut < line.size();
      fields_.emplace_back(line.substr(0, cut));
      line.remove_prefix(std::min(cut + 1, line.size()));
    }
    if (columns_ == 0) columns_ = fields;
    if (fields != columns_) {
      refuse("line " + std::to_string((fields_.size() - fields) / columns_ + 1) + " has " + std::to_string(fields) +
             " fields, the first has " + std::to_string(columns_));
    }
  }
  if (columns_ > 0) header_ = !number(fields_[columns_ - 1]) || !number(fields_[0]);
  if (fields_.size() <= (header_ ? columns_ : 0)) refuse("no row of numbers");
}

void Table::refuse(const std::string& why) const {
  throw InvalidArgument(argument_, "'" + path_ + "' (" + why + ")",
                        "CSV rows of numbers, after at most one row of names");
}

std::size_t Table::column(const std::string& argument, const std::string& name) const {
  if (header_) {
    const auto end = fields_.begin() + static_cast<std::ptrdiff_t>(columns_);
    const auto found = std::find(fields_.begin(), end, name);
    if (found != end) return static_cast<std::size_t>(found - fields_.begin());
  }
  std::size_t number = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), number);
  if (error == std::errc() && end == name.data() + name.size() && number >= 1 && number <= columns_) return number - 1;
  throw InvalidArgument(argument, "'" + name + "'",
                        "a name in the first row, or a number from 1 to " + std::to_string(columns_));
}

std::vector<double> Table::numbers(std::size_t column) const {
  std::vector<double> values;
  for (std::size_t i = column + (header_ ? columns_ : 0); i < fields_.size(); i += columns_) {
    const std::optional<double> value = number(fields_[i]);
    if (!value || !std::isfinite(*value)) {
      refuse("'" + fields_[i] + "' in line " + std::to_string(i / columns_ + 1) + ", column " +
             std::to_string(column + 1) + " is not a finite number");
    }
    values.push_back(*value);
  }
  return values;
}

void Table::set_numbers(std::size_t column, std::span<const double> numbers) {
  std::size_t i = column + (header_ ? columns_ : 0);
  for (const double value : numbers) {
    char digits[32];
    const auto [end, error] = std::to_chars(digits, digits + sizeof(digits), value, std::chars_format::general, 15);
    fields_[i].assign(digits, error == std::errc() ? end : digits);
    i += columns_;
  }
}

std::vector<std::byte> Table::text() const {
  std::string all;
  for (std::size_t i = 0; i < fields_.size(); ++i) {
    all += fields_[i];
    const bool last_of_row = (i + 1) % columns_ == 0;
    if (!last_of_row) all += separator_;
    if (last_of_row && (ended_ || i + 1 < fields_.size())) all += line_end_;
  }
  const auto* first = reinterpret_cast<const std::byte*>(all.data());
  return {first, first + all.size()};
}

}  // namespace vicus::cli
