#include "cli/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <system_error>
#include <utility>

#include "vicus/error.h"

namespace vicus::cli {
namespace {

constexpr std::size_t kPipeChunk = std::size_t{1} << 20;

[[noreturn]] void fail(const std::string& argument, const std::string& what, const std::string& path, int error) {
  throw IoError(argument + ": " + what + " '" + path + "': " + std::generic_category().message(error));
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(Descriptor&&) = delete;
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(Descriptor&&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  [[nodiscard]] int get() const { return fd_; }
  /// Closing is where a network file system reports what it could not write.
  int close() { return ::close(std::exchange(fd_, -1)); }

 private:
  int fd_;
};

std::filesystem::path directory_of(const std::string& path) {
  const std::filesystem::path parent = std::filesystem::path(path).parent_path();
  return parent.empty() ? std::filesystem::path(".") : parent;
}

/// Reads up to `size` bytes; fewer only at the end of the file.
std::size_t read_fully(int fd, std::byte* to, std::size_t size, const std::string& argument, const std::string& path) {
  std::size_t done = 0;
  while (done < size) {
    const ssize_t n = ::read(fd, to + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(argument, "cannot read", path, errno);
    if (n == 0) break;
    done += static_cast<std::size_t>(n);
  }
  return done;
}

/// What an output must not be: a directory, or a device or pipe that the rename would replace by a file.
void check_output_path(const std::string& argument, const std::string& path) {
  if (path.empty()) throw InvalidArgument(argument, "''", "a file name");
  struct stat status{};
  if (::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) {
    throw InvalidArgument(argument, (S_ISDIR(status.st_mode) ? "the directory '" : "the special file '") + path + "'",
                          "the name of a regular file");
  }
  if (path.back() == '/') throw InvalidArgument(argument, "'" + path + "'", "the name of a regular file");
  const std::string directory = directory_of(path).string();
  if (::stat(directory.c_str(), &status) != 0) fail(argument, "cannot write", path, errno);
  if (!S_ISDIR(status.st_mode)) fail(argument, "cannot write", path, ENOTDIR);
  if (::access(directory.c_str(), W_OK | X_OK) != 0) fail(argument, "cannot write", path, errno);
}

}  // namespace

std::vector<std::byte> DiskFiles::read(const std::string& argument, const std::string& path) {
  Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) fail(argument, "cannot open", path, errno);
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) fail(argument, "cannot read", path, errno);
  if (S_ISDIR(status.st_mode)) throw InvalidArgument(argument, "the directory '" + path + "'", "a file");
  std::vector<std::byte> bytes;
  if (S_ISREG(status.st_mode)) {
    bytes.resize(static_cast<std::size_t>(status.st_size));
    bytes.resize(read_fully(file.get(), bytes.data(), bytes.size(), argument, path));
    return bytes;
  }
  if (!S_ISFIFO(status.st_mode)) throw InvalidArgument(argument, "the device '" + path + "'", "a file or a pipe");
  for (std::size_t done = 0;;) {
    bytes.resize(done + kPipeChunk);
    const std::size_t n = read_fully(file.get(), bytes.data() + done, kPipeChunk, argument, path);
    done += n;
    bytes.resize(done);
    if (n < kPipeChunk) return bytes;
  }
}

void DiskFiles::check_output(const std::string& argument, const std::string& path) {
  check_output_path(argument, path);
}

void DiskFiles::write(std::span<const OutputBytes> outputs) {
  std::vector<OutputFile> files;
  files.reserve(outputs.size());
  for (const OutputBytes& output : outputs) {
    OutputFile& file = files.emplace_back(output.argument, output.path);
    for (const std::span<const std::byte> piece : output.pieces) file.append(piece);
  }
  for (OutputFile& file : files) file.flush();
  for (OutputFile& file : files) file.commit();
}

OutputFile::OutputFile(std::string argument, std::string path)
    : argument_(std::move(argument)), path_(std::move(path)) {
  check_output_path(argument_, path_);
  static std::atomic<unsigned> counter{0};
  for (int attempt = 0; attempt < 100; ++attempt) {
    const std::string name = ".vicus-" + std::to_string(::getpid()) + "-" + std::to_string(counter++) + ".tmp";
    const std::string temporary = (directory_of(path_) / name).string();
    const Descriptor file(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    if (file.get() >= 0) {
      temporary_ = temporary;
      return;
    }
    if (errno != EEXIST) fail(argument_, "cannot write", path_, errno);
  }
  fail(argument_, "cannot write", path_, EEXIST);
}

OutputFile::~OutputFile() {
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : argument_(std::move(other.argument_)),
      path_(std::move(other.path_)),
      temporary_(std::exchange(other.temporary_, std::string())) {}

void OutputFile::append(std::span<const std::byte> bytes) {
  Descriptor file(::open(temporary_.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC));
  if (file.get() < 0) fail(argument_, "cannot write", path_, errno);
  while (!bytes.empty()) {
    const ssize_t n = ::write(file.get(), bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(argument_, "cannot write", path_, errno);
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
  if (file.close() != 0) fail(argument_, "cannot write", path_, errno);
}

void OutputFile::flush() {
  Descriptor file(::open(temporary_.c_str(), O_WRONLY | O_CLOEXEC));
  if (file.get() < 0 || ::fsync(file.get()) != 0 || file.close() != 0) fail(argument_, "cannot write", path_, errno);
}

void OutputFile::commit() {
  flush();
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(argument_, "cannot write", path_, errno);
  temporary_.clear();
}

}  // namespace vicus::cli
