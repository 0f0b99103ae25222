#include "jit/compile.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "core/log.h"
#include "jit/cache.h"
#include "jit/library.h"
#include "jit/nvrtc.h"
#include "jit/sha256.h"
#include "vicus/error.h"
#include "vicus/info.h"

namespace vicus::jit {
namespace {

/// `arch`, or the one that this NVRTC knows and whose code runs there.
Arch compilable(const Nvrtc& nvrtc, Arch arch, bool arch_specific) {
  const std::vector<int>& known = nvrtc.architectures();
  for (int minor = arch.minor; minor >= (arch_specific ? arch.minor : 0); --minor) {
    if (std::find(known.begin(), known.end(), 10 * arch.major + minor) == known.end()) continue;
    return {arch.major, minor};
  }
  std::string list;
  for (const int each : known) list += (list.empty() ? "" : ", ") + std::to_string(each);
  throw Unsupported("architecture is " + name_of(arch) + "; NVRTC " + nvrtc.version() + " (" + nvrtc.path() +
                    ") compiles for: " + list);
}

std::vector<std::string> options_for(Arch arch, bool arch_specific) {
  return {"--gpu-architecture=" + name_of(arch) + (arch_specific ? "a" : ""), "--std=c++20", "--ptxas-options=-v"};
}

/// All that goes into one compilation.
struct Job {
  std::string name, text;
  std::vector<EmbeddedFile> headers;
  std::vector<std::string> options;

  Job(const Source& source, Arch arch)
      : name(name_of(source)),
        text(text_of(source)),
        headers(headers_of(text)),
        options(options_for(arch, source.arch_specific)) {}

  /// Of everything that the machine code depends on, but for the compiler's version.
  [[nodiscard]] std::string digest() const {
    Sha256 sum;
    sum.add_sized(version());
    sum.add_sized(text);
    for (const std::string& option : options) sum.add_sized(option);
    for (const EmbeddedFile& header : headers) {
      sum.add_sized(header.name);
      sum.add_sized(header.text);
    }
    return hex(sum.finish());
  }

  [[nodiscard]] DiskCache::Entry run(const Nvrtc& compiler, double& seconds) const {
    const auto start = std::chrono::steady_clock::now();
    Nvrtc::Result result = compiler.compile(name, text, headers, options);
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return {std::move(result.cubin), std::move(result.log)};
  }
};

/// Kernels compiled ahead of time, wherever and by whatever compiler: only read.
DiskCache& prebuilt() {
  static DiskCache cache(environment("VICUS_PREBUILT_DIR"), 0);
  return cache;
}

/// Finds " 12 bytes stack frame" and the like in ptxas's report: the numbers before `unit`, one by one.
template <class Use>
void each_number(std::string_view log, std::string_view unit, const Use& use) {
  for (std::size_t at = log.find(unit); at != std::string_view::npos; at = log.find(unit, at + 1)) {
    std::size_t begin = at;
    while (begin > 0 && log[begin - 1] >= '0' && log[begin - 1] <= '9') --begin;
    int value = 0;
    if (std::from_chars(log.data() + begin, log.data() + at, value).ec == std::errc()) use(value);
  }
}

void read_log(CompileReport& report, std::string text) {
  report.log = std::move(text);
  const std::string_view log = report.log;
  constexpr std::string_view kEntry = "Compiling entry function '";
  const std::size_t entry = log.find(kEntry);
  if (entry == std::string_view::npos || log.find(kEntry, entry + 1) != std::string_view::npos) {
    throw CompileError("a kernel source has exactly one __global__ function", report.log);
  }
  const std::string_view name = log.substr(entry + kEntry.size());
  report.kernel = name.substr(0, name.find('\''));
  // Functions that were not inlined have frames and spills of their own.
  each_number(log, " bytes stack frame", [&](int n) { report.stack_bytes = std::max(report.stack_bytes, n); });
  each_number(log, " bytes cumulative stack", [&](int n) { report.stack_bytes = std::max(report.stack_bytes, n); });
  each_number(log, " bytes spill stores", [&](int n) { report.spill_store_bytes += n; });
  each_number(log, " bytes spill loads", [&](int n) { report.spill_load_bytes += n; });
  each_number(log, " registers", [&](int n) { report.registers = std::max(report.registers, n); });
  each_number(log, " bytes smem", [&](int n) { report.shared_bytes += n; });
}

}  // namespace

std::string name_of(Arch arch) { return "sm_" + std::to_string(10 * arch.major + arch.minor); }

std::string cubin(const Source& source, Arch arch, CompileReport* report) {
  CompileReport made;
  const auto finish = [&](DiskCache::Entry entry) {
    read_log(made, std::move(entry.log));
    if (log_wanted(LogLevel::debug)) {
      log(LogLevel::debug, name_of(source) + " for " + name_of(arch) + ": " + std::to_string(made.registers) +
                               " registers, " +
                               (made.from_cache ? "from the disk" : std::to_string(made.seconds) + " s to compile"));
    }
    if (report != nullptr) *report = std::move(made);
    return std::move(entry.cubin);
  };
  if (!prebuilt().directory().empty()) {
    if (auto entry = prebuilt().find(Job(source, arch).digest())) {
      made.from_cache = true;
      return finish(std::move(*entry));
    }
  }
  const Nvrtc& compiler = nvrtc();
  const Job job(source, compilable(compiler, arch, source.arch_specific));
  const std::string name = job.digest() + "-nvrtc" + compiler.version();
  return finish(user_cache().get(name, [&] { return job.run(compiler, made.seconds); }, made.from_cache));
}

bool compiles_into_cache() {
  static_cast<void>(prebuilt());  // and all that `cubin` uses is there
  try {
    static_cast<void>(nvrtc());
  } catch (const Unsupported&) {
    return false;
  }
  return !user_cache().directory().empty() && user_cache().limit_bytes() > 0;
}

void require_compiler(Arch arch) {
  const Nvrtc& compiler = nvrtc();
  if (compilable(compiler, arch, false) == arch) return;
  throw Unsupported("NVRTC " + compiler.version() + " (" + compiler.path() + ") does not compile for " + name_of(arch));
}

CompileReport prebuild(const Source& source, Arch arch, const std::string& directory) {
  require_compiler(arch);
  const Nvrtc& compiler = nvrtc();
  const Job job(source, arch);
  DiskCache cache(directory, std::numeric_limits<std::uint64_t>::max());
  CompileReport made;
  static_cast<void>(cache.get(job.digest(), [&] { return job.run(compiler, made.seconds); }, made.from_cache));
  std::optional<DiskCache::Entry> entry = cache.find(job.digest());
  if (!entry) throw std::runtime_error("cannot write compiled kernels to " + directory);
  read_log(made, std::move(entry->log));
  return made;
}

}  // namespace vicus::jit
