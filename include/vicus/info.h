// What this build and this machine are.
#ifndef VICUS_INFO_H_
#define VICUS_INFO_H_

#include <cstdint>
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

/// A CUDA device as the driver describes it.
struct GpuDevice {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
};

/// What runs and compiles GPU kernels here.
struct GpuRuntime {
  std::string driver_problem;  // why the GPU cannot be used; empty: it can, and the next three hold
  std::string driver_library, driver_version;
  std::vector<GpuDevice> devices;

  std::string compiler_problem;  // why nothing can be compiled; empty: it can, and the next four hold
  std::string compiler_library, compiler_version;
  std::vector<int> compiler_architectures;  // 80, 86, 90, ...
  std::string compiler_found_in;  // "VICUS_NVRTC", "the process", "the Python packages", "CUDA_HOME", "the system"

  std::string prebuilt_directory;  // VICUS_PREBUILT_DIR: kernels compiled ahead of time, looked at first
  std::string cache_directory;     // of compiled kernels; empty: there is none
  std::uint64_t cache_bytes = 0, cache_limit_bytes = 0;
  int cache_entries = 0;
};

/// Starts the driver and opens the compiler, but makes no context and no file.
[[nodiscard]] VICUS_API GpuRuntime gpu_runtime();

}  // namespace vicus

#endif  // VICUS_INFO_H_
