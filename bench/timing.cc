#include "timing.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <fstream>
#include <string>

namespace vicus::bench {
namespace {

constexpr double kShortestSample = 100e-6;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double cpu_seconds_now() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

/// A field of /proc/self/status in bytes, where there is one.
std::optional<std::int64_t> status_bytes(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(field + ":")) return std::stoll(line.substr(field.size() + 1)) * 1024;
  }
  return {};
}

/// `field` without the pages of files: programs and libraries are read as they are run, and are nobody's scratch.
std::optional<std::int64_t> without_files(const std::string& field) {
  const auto all = status_bytes(field), files = status_bytes("RssFile");
  if (!all || !files) return std::nullopt;
  return *all - *files;
}

}  // namespace

Timing time_calls(const std::function<void()>& call, const TimingOptions& options) {
  call();  // memory, threads and caches warm up
  const double first = seconds_now();
  call();
  const double one = seconds_now() - first;
  const int calls = one >= kShortestSample ? 1 : static_cast<int>(kShortestSample / std::max(one, 1e-7)) + 1;
  Timing timing;
  const double begin = seconds_now(), cpu_begin = cpu_seconds_now();
  while (true) {
    const double spent = seconds_now() - begin;
    const bool enough = static_cast<int>(timing.samples.size()) >= options.repeats && spent >= options.least_seconds;
    if (enough || (!timing.samples.empty() && spent >= options.most_seconds)) break;
    const double start = seconds_now();
    for (int i = 0; i < calls; ++i) call();
    timing.samples.push_back((seconds_now() - start) / calls);
  }
  timing.cpu_seconds = (cpu_seconds_now() - cpu_begin) / calls / static_cast<double>(timing.samples.size());
  return timing;
}

std::optional<std::int64_t> resident_bytes() { return without_files("VmRSS"); }

std::optional<std::int64_t> peak_resident_bytes(const std::function<void()>& call) {
  std::ofstream clear("/proc/self/clear_refs");
  clear << "5";  // the peak starts again from what is resident now
  const bool cleared = static_cast<bool>(clear.flush());
  call();
  return cleared ? without_files("VmHWM") : std::nullopt;
}

}  // namespace vicus::bench
