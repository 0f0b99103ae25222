// One-dimensional signals in memory: sound files through libsndfile, and columns of numbers in CSV text.
#ifndef VICUS_CLI_AUDIO_H_
#define VICUS_CLI_AUDIO_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vicus::cli {

struct Sound {
  int format = 0;  ///< libsndfile's: container and sample type, kept for the output
  int rate = 0;
  int channels = 1;
  std::vector<double> samples;  ///< [frames, channels], full scale is 1
};

/// Throws InvalidArgument naming `argument` and `path` when libsndfile does not take the file.
[[nodiscard]] Sound decode_sound(const std::string& argument, const std::string& path, std::span<const std::byte> file);

/// The file of a sound, in its own format. Samples beyond full scale are clipped.
[[nodiscard]] std::vector<std::byte> encode_sound(const Sound& sound);

/// CSV text as it stands: rows of fields, split at commas, semicolons or tabs (the first of them that the text holds,
/// in the order tab, semicolon, comma). No quoting: numbers need none, and a quote is refused.
class Table {
 public:
  /// Throws InvalidArgument naming `argument` and `path` on text that is no table: rows of unequal length, quotes.
  Table(const std::string& argument, const std::string& path, std::span<const std::byte> file);

  [[nodiscard]] std::size_t columns() const noexcept { return columns_; }
  /// Index of a column given by its name in the header or by its number from 1. Throws InvalidArgument.
  [[nodiscard]] std::size_t column(const std::string& argument, const std::string& name) const;
  /// The numbers of a column, below the header. Throws InvalidArgument on a field that is not a finite number.
  [[nodiscard]] std::vector<double> numbers(std::size_t column) const;
  /// Replaces the numbers of a column, written with 15 digits.
  void set_numbers(std::size_t column, std::span<const double> numbers);
  /// The text, all other fields unchanged.
  [[nodiscard]] std::vector<std::byte> text() const;

 private:
  [[noreturn]] void refuse(const std::string& why) const;

  std::string argument_, path_, line_end_ = "\n";
  char separator_ = ',';
  bool header_ = false;  ///< the first row holds names
  bool ended_ = true;    ///< the last row ends with a line end
  std::size_t columns_ = 0;
  std::vector<std::string> fields_;  ///< [rows, columns]
};

}  // namespace vicus::cli

#endif  // VICUS_CLI_AUDIO_H_
