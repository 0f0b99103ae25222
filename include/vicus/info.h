// What this build and this machine are.
#ifndef VICUS_INFO_H_
#define VICUS_INFO_H_

#include <string>
#include <string_view>
#include <vector>

#include "vicus/export.h"

namespace vicus {

/// "0.1.0".
[[nodiscard]] VICUS_API std::string_view version() noexcept;

/// Instruction sets the CPU engine was built for, best first: "AVX3", "AVX2", "SSE4" or "NEON" (Highway's names).
[[nodiscard]] VICUS_API std::vector<std::string> cpu_targets_built();

/// Those of them this machine runs, best first; the first is used.
[[nodiscard]] VICUS_API std::vector<std::string> cpu_targets_available();

/// Limits the CPU engine to one of `cpu_targets_available()`; an empty name lifts the limit. For tests and comparisons;
/// the environment variable VICUS_CPU_TARGET does the same at start. Throws InvalidArgument on another name.
VICUS_API void limit_cpu_target(std::string_view name);

/// Threads the CPU engine uses when a plan does not say.
[[nodiscard]] VICUS_API int default_threads() noexcept;

}  // namespace vicus

#endif  // VICUS_INFO_H_
