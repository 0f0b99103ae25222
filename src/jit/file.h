// A file descriptor that closes itself, and whole reads and writes on it.
#ifndef VICUS_JIT_FILE_H_
#define VICUS_JIT_FILE_H_

#include <chrono>
#include <filesystem>
#include <string>
#include <string_view>

namespace vicus::jit {

class File {
 public:
  /// As open(2), close-on-exec; not `*this` when that fails, and errno says why.
  File(const std::filesystem::path& path, int flags);
  ~File();
  File(File&& other) noexcept;
  File(const File&) = delete;
  File& operator=(File&& other) noexcept;
  File& operator=(const File&) = delete;

  explicit operator bool() const noexcept { return descriptor_ >= 0; }
  [[nodiscard]] int descriptor() const noexcept { return descriptor_; }

  /// All of it, or nothing on an error.
  [[nodiscard]] std::string read_all() const;
  /// Replaces the contents and waits until they are on disk. False on an error; errno says which.
  [[nodiscard]] bool write_all(std::string_view bytes) const;
  /// Marks it as used now.
  void touch() const;
  /// An exclusive flock, within `patience`. False when another has it all that time (errno is EWOULDBLOCK) or the file
  /// system has no locks.
  [[nodiscard]] bool lock(std::chrono::milliseconds patience) const;
  /// Whether `path` still names this file, which another process may have renamed or removed.
  [[nodiscard]] bool is(const std::filesystem::path& path) const;

 private:
  int descriptor_;
};

}  // namespace vicus::jit

#endif  // VICUS_JIT_FILE_H_
