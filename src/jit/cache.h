// Compiled kernels on disk, shared by all processes of a user.
//
// One file an entry: magic, sizes, SHA-256 over the entry's name and contents, the compiler's log, the cubin. A file that
// is damaged, cut short or belongs to another name is deleted and counts as missing.
//
// Writing: `NAME.vicus.tmp` is both the lock (flock) and the file under construction; it is renamed to `NAME.vicus` when
// it is complete and on disk. So one process compiles while the others wait for the lock, a process killed at any point
// leaves at most a .tmp that the next one overwrites, and nobody ever sees half an entry.
//
// A directory that cannot be written costs a warning in the log, once, never the call.
#ifndef VICUS_JIT_CACHE_H_
#define VICUS_JIT_CACHE_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

namespace vicus::jit {

class DiskCache {
 public:
  struct Entry {
    std::string cubin, log;
  };
  struct Usage {
    std::uint64_t bytes = 0;
    int entries = 0;
  };

  /// `limit_bytes`: beyond it, the entries not used for longest are removed; 0 stores nothing. An empty `directory`:
  /// there is no place for a cache. `patience`: how long to wait for another process that is making the same entry.
  DiskCache(std::filesystem::path directory, std::uint64_t limit_bytes,
            std::chrono::milliseconds patience = std::chrono::seconds(60));

  /// The entry, if it is there and whole. `name` is a file name without its extension.
  [[nodiscard]] std::optional<Entry> find(const std::string& name);

  /// The entry, or else what `build` returns, which is stored. Sets `hit` to whether it was there.
  [[nodiscard]] Entry get(const std::string& name, const std::function<Entry()>& build, bool& hit);

  [[nodiscard]] const std::filesystem::path& directory() const noexcept { return directory_; }
  [[nodiscard]] std::uint64_t limit_bytes() const noexcept { return limit_; }
  [[nodiscard]] Usage usage() const;

 private:
  [[nodiscard]] std::filesystem::path path_of(const std::string& name) const;
  void trim() const;
  void warn(const std::string& what, int error);

  std::filesystem::path directory_;
  std::uint64_t limit_;
  std::chrono::milliseconds patience_;
  std::atomic<bool> warned_{false};
};

/// The user's cache: VICUS_CACHE_DIR, or vicus below XDG_CACHE_HOME or ~/.cache; VICUS_CACHE_BYTES or 1 GiB.
[[nodiscard]] DiskCache& user_cache();

}  // namespace vicus::jit

#endif  // VICUS_JIT_CACHE_H_
