#include "core/log.h"

#include <atomic>
#include <mutex>
#include <utility>

namespace vicus {
namespace {

constexpr int kOff = 1 << 10;
std::atomic<int> least_level{kOff};

std::recursive_mutex& sink_mutex() {  // a sink may use the library
  static std::recursive_mutex mutex;
  return mutex;
}

LogSink& sink() {
  static LogSink current;
  return current;
}

}  // namespace

void set_log_sink(LogSink new_sink, LogLevel least) {
  const std::lock_guard lock(sink_mutex());
  least_level = new_sink ? static_cast<int>(least) : kOff;
  sink() = std::move(new_sink);
}

bool log_wanted(LogLevel level) noexcept {
  return static_cast<int>(level) >= least_level.load(std::memory_order_relaxed);
}

void log(LogLevel level, std::string_view message) {
  if (!log_wanted(level)) return;
  const std::lock_guard lock(sink_mutex());
  const LogSink current = sink();  // which a sink may replace
  if (current) current(level, message);
}

}  // namespace vicus
