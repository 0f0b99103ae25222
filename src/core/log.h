// How the library writes to the logger of vicus/log.h.
#ifndef VICUS_CORE_LOG_H_
#define VICUS_CORE_LOG_H_

#include <string_view>

#include "vicus/log.h"

namespace vicus {

/// True when a message of `level` would be heard: ask before building an expensive text.
[[nodiscard]] bool log_wanted(LogLevel level) noexcept;
void log(LogLevel level, std::string_view message);

}  // namespace vicus

#endif  // VICUS_CORE_LOG_H_
