// Files in and out. Inputs are read whole and parsed in memory; outputs are written under a temporary name in the same
// directory and renamed, so that a file either holds the whole result or is not there, whatever fails in between.
#ifndef VICUS_CLI_FILES_H_
#define VICUS_CLI_FILES_H_

#include <cstddef>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace vicus::cli {

/// The machine said no. `what()` reads "<argument>: <what failed> '<path>': <why>".
class IoError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Bytes of one file, in pieces (a header, then arrays) so that arrays are not copied to be written.
struct OutputBytes {
  std::string argument;  ///< option that named the file: "--output"
  std::string path;
  std::vector<std::span<const std::byte>> pieces;
};

/// Where files come from and go to: the disk, or memory in tests and fuzzers.
class Files {
 public:
  Files() = default;
  Files(const Files&) = default;
  Files(Files&&) = default;
  Files& operator=(const Files&) = default;
  Files& operator=(Files&&) = default;
  virtual ~Files() = default;
  /// The whole file. Throws IoError naming `argument`.
  virtual std::vector<std::byte> read(const std::string& argument, const std::string& path) = 0;
  /// Throws IoError, or InvalidArgument for a path that is not a file's, before any work is spent on the output.
  virtual void check_output(const std::string& argument, const std::string& path) = 0;
  /// Writes all files or none: each to a temporary name first, then all are renamed.
  virtual void write(std::span<const OutputBytes> outputs) = 0;
};

class DiskFiles : public Files {
 public:
  std::vector<std::byte> read(const std::string& argument, const std::string& path) override;
  void check_output(const std::string& argument, const std::string& path) override;
  void write(std::span<const OutputBytes> outputs) override;
};

/// A file on its way: created under a temporary name beside `path`, renamed by `commit`, removed if that never comes.
/// For libraries that write by file name: hand them `temporary()`.
class OutputFile {
 public:
  /// Creates the empty temporary file. Throws as `Files::check_output` does.
  OutputFile(std::string argument, std::string path);
  ~OutputFile();
  OutputFile(OutputFile&& other) noexcept;
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  OutputFile& operator=(OutputFile&&) = delete;

  [[nodiscard]] const std::string& temporary() const noexcept { return temporary_; }
  /// Appends to the temporary file. Throws IoError.
  void append(std::span<const std::byte> bytes);
  /// Brings what was written to the disk; what can fail for want of space fails here. Throws IoError.
  void flush();
  /// Flushes and gives the file its name; replaces what was there. Throws IoError.
  void commit();

 private:
  std::string argument_, path_, temporary_;  // temporary_ is empty once there is nothing to remove
};

}  // namespace vicus::cli

#endif  // VICUS_CLI_FILES_H_
