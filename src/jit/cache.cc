#include "jit/cache.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "core/log.h"
#include "jit/file.h"
#include "jit/library.h"
#include "jit/sha256.h"

namespace vicus::jit {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kExtension = ".vicus", kTemporary = ".vicus.tmp";
constexpr std::uint64_t kDefaultLimit = std::uint64_t{1} << 30;

/// What a file begins with; the log and the cubin follow. Read and written by one machine: its own byte order.
struct Header {
  std::array<char, 8> magic;
  std::uint64_t log_bytes, cubin_bytes;
  Sha256::Digest checksum;
};
constexpr std::array<char, 8> kMagic = {'v', 'i', 'c', 'u', 's', 'j', '0', '1'};

Sha256::Digest checksum(const std::string& name, std::string_view log, std::string_view cubin) {
  Sha256 sum;
  for (const std::string_view part : {std::string_view(name), log, cubin}) sum.add_sized(part);
  return sum.finish();
}

std::string pack(const std::string& name, const DiskCache::Entry& entry) {
  const Header header{kMagic, entry.log.size(), entry.cubin.size(), checksum(name, entry.log, entry.cubin)};
  std::string bytes(sizeof(Header), '\0');
  std::memcpy(bytes.data(), &header, sizeof(Header));
  return bytes + entry.log + entry.cubin;
}

std::optional<DiskCache::Entry> unpack(const std::string& name, const std::string& bytes) {
  Header header;
  if (bytes.size() < sizeof(Header)) return {};
  std::memcpy(&header, bytes.data(), sizeof(Header));
  const std::uint64_t left = bytes.size() - sizeof(Header);
  if (header.magic != kMagic || header.log_bytes > left || header.cubin_bytes != left - header.log_bytes) return {};
  const std::string_view log = std::string_view(bytes).substr(sizeof(Header), header.log_bytes);
  const std::string_view cubin = std::string_view(bytes).substr(sizeof(Header) + header.log_bytes);
  if (checksum(name, log, cubin) != header.checksum) return {};
  return DiskCache::Entry{std::string(cubin), std::string(log)};
}

struct OnDisk {
  fs::path path;
  std::uint64_t bytes;
  fs::file_time_type used;
};

/// Files whose names end in `extension`. Others are not ours to count or remove.
std::vector<OnDisk> list_files(const fs::path& directory, std::string_view extension) {
  std::vector<OnDisk> files;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    if (!it->path().filename().string().ends_with(extension)) continue;
    std::error_code gone;  // another process may be removing files, too
    OnDisk file{it->path(), it->file_size(gone), it->last_write_time(gone)};
    if (!gone) files.push_back(std::move(file));
  }
  return files;
}

/// Removes a temporary file that has no writer: its process was killed.
void remove_if_abandoned(const fs::path& path) {
  const File file(path, O_RDWR);
  if (!file || !file.lock(std::chrono::milliseconds(0)) || !file.is(path)) return;
  std::error_code ignored;
  fs::remove(path, ignored);
}

/// The file at `path`, made if need be, once it is ours alone. None: errno says why.
std::optional<File> open_locked(const fs::path& path, std::chrono::milliseconds patience) {
  while (true) {
    File file(path, O_RDWR | O_CREAT);
    if (!file || !file.lock(patience)) return {};
    if (file.is(path)) return file;  // else the one before us renamed or removed it
  }
}

fs::path user_directory() {
  if (const std::string chosen = environment("VICUS_CACHE_DIR"); !chosen.empty()) return chosen;
  if (const fs::path home = environment("XDG_CACHE_HOME"); home.is_absolute()) return home / "vicus";
  if (const fs::path home = environment("HOME"); home.is_absolute()) return home / ".cache" / "vicus";
  return {};
}

std::uint64_t user_limit() {
  const std::string text = environment("VICUS_CACHE_BYTES");
  if (text.empty()) return kDefaultLimit;
  std::uint64_t bytes = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), bytes);
  if (error == std::errc() && end == text.data() + text.size()) return bytes;
  log(LogLevel::warning, "VICUS_CACHE_BYTES is '" + text + "'; allowed: a number of bytes; 1 GiB is used");
  return kDefaultLimit;
}

}  // namespace

DiskCache::DiskCache(fs::path directory, std::uint64_t limit_bytes, std::chrono::milliseconds patience)
    : directory_(std::move(directory)), limit_(limit_bytes), patience_(patience) {}

fs::path DiskCache::path_of(const std::string& name) const { return directory_ / (name + std::string(kExtension)); }

std::optional<DiskCache::Entry> DiskCache::find(const std::string& name) {
  if (directory_.empty()) return {};
  const fs::path path = path_of(name);
  const File file(path, O_RDONLY);
  if (!file) return {};
  std::optional<Entry> entry = unpack(name, file.read_all());
  if (entry) {
    file.touch();
  } else {
    log(LogLevel::warning, "the cached kernel " + path.string() + " is damaged and is compiled again");
    std::error_code ignored;
    fs::remove(path, ignored);
  }
  return entry;
}

DiskCache::Entry DiskCache::get(const std::string& name, const std::function<Entry()>& build, bool& hit) {
  const auto found = [&] {
    std::optional<Entry> entry = find(name);
    hit = entry.has_value();
    return entry;
  };
  if (auto entry = found()) return std::move(*entry);
  if (directory_.empty())
    warn("compiled kernels are not kept: VICUS_CACHE_DIR, XDG_CACHE_HOME and HOME are not set", 0);
  if (directory_.empty() || limit_ == 0) return build();
  std::error_code ignored;  // what cannot be made cannot be opened, below
  if (fs::create_directories(directory_, ignored)) fs::permissions(directory_, fs::perms::owner_all, ignored);

  const fs::path temporary = directory_ / (name + std::string(kTemporary));
  const std::optional<File> file = open_locked(temporary, patience_);
  if (!file) {
    warn("compiled kernels cannot be kept in " + directory_.string(), errno);
    return build();
  }
  try {
    if (auto entry = found()) {  // another made it while we waited
      fs::remove(temporary, ignored);
      return std::move(*entry);
    }
    Entry entry = build();
    if (file->write_all(pack(name, entry)) && std::rename(temporary.c_str(), path_of(name).c_str()) == 0) {
      trim();
    } else {
      warn("a compiled kernel cannot be written to " + directory_.string(), errno);
      fs::remove(temporary, ignored);
    }
    return entry;
  } catch (...) {
    fs::remove(temporary, ignored);
    throw;
  }
}

DiskCache::Usage DiskCache::usage() const {
  Usage total;
  for (const OnDisk& file : list_files(directory_, kExtension)) {
    total.bytes += file.bytes;
    ++total.entries;
  }
  return total;
}

void DiskCache::trim() const {
  for (const OnDisk& file : list_files(directory_, kTemporary)) remove_if_abandoned(file.path);
  std::vector<OnDisk> files = list_files(directory_, kExtension);
  std::uint64_t total = 0;
  for (const OnDisk& file : files) total += file.bytes;
  if (total <= limit_) return;
  std::sort(files.begin(), files.end(), [](const OnDisk& a, const OnDisk& b) { return a.used < b.used; });
  for (const OnDisk& file : files) {
    if (total <= limit_) return;
    std::error_code ignored;
    fs::remove(file.path, ignored);
    total -= file.bytes;
  }
}

void DiskCache::warn(const std::string& what, int error) {
  if (warned_.exchange(true)) return;
  log(LogLevel::warning, what + (error == 0 ? "" : ": " + std::generic_category().message(error)));
}

DiskCache& user_cache() {
  static DiskCache cache(user_directory(), user_limit());
  return cache;
}

}  // namespace vicus::jit
