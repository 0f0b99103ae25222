// The one logger. Off by default; the library never prints. Give it a sink to hear it.
#ifndef VICUS_LOG_H_
#define VICUS_LOG_H_

#include <functional>
#include <string_view>

#include "vicus/export.h"

namespace vicus {

enum class LogLevel { debug, info, warning };

/// Receives one message, without a line end. May be called from any thread, never from two at once.
using LogSink = std::function<void(LogLevel, std::string_view)>;

/// Installs `sink` for messages of at least `least`; an empty sink switches logging off. Thread-safe.
VICUS_API void set_log_sink(LogSink sink, LogLevel least = LogLevel::info);

}  // namespace vicus

#endif  // VICUS_LOG_H_
