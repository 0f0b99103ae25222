// GPU kernels compiled ahead of time, into a directory that can be shipped: a process that finds it in VICUS_PREBUILT_DIR
// takes its kernels from there and needs no compiler. Needs no GPU, only NVRTC (info.h says whether it is there).
#ifndef VICUS_COMPILE_H_
#define VICUS_COMPILE_H_

#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "vicus/export.h"
#include "vicus/plan.h"
#include "vicus/prepare.h"
#include "vicus/problem.h"

namespace vicus {

/// Architectures that `gpu_targets` knows: "sm_80", "sm_86", ...
[[nodiscard]] VICUS_API std::vector<std::string> gpu_architectures();

/// The usual GPUs of an architecture, the one with most multiprocessors first. Tiles depend on multiprocessors and shared
/// memory, hence kernels do. Throws InvalidArgument naming `argument`.
[[nodiscard]] VICUS_API std::vector<GpuTarget> gpu_targets(std::string_view arch, const std::string& argument = "arch");

/// The GPUs of this machine, each kind once; none where there is no driver.
[[nodiscard]] VICUS_API std::vector<GpuTarget> gpu_targets_here();

struct CompileOptions {
  std::vector<GpuTarget> targets = {};  ///< GPUs to compile for
  CallSet calls = {};                   ///< calls to compile for
  /// Backward passes that are bit-exact (true), that sum in no fixed order where the engine can (false), or both (empty).
  std::optional<bool> deterministic = {};
  int jobs = 0;  ///< kernels compiled at a time; 0: as many as there are cores
};

/// One kernel of the directory. Bytes of spills and stack are of a thread.
struct CompiledKernel {
  std::string name;         ///< of its text: "forward.cu"
  std::string arch;         ///< "sm_80"
  std::size_t problem = 0;  ///< the first that needs it
  int threads = 0, registers = 0, shared_bytes = 0, stack_bytes = 0, spill_bytes = 0;
  double seconds = 0;       ///< in the compiler
  bool from_cache = false;  ///< it was in the directory already
};

/// What a GPU has no kernel for.
struct SkippedCalls {
  std::size_t problem = 0;
  std::string arch, reason;
};

struct CompileResult {
  std::vector<CompiledKernel> kernels;
  std::vector<SkippedCalls> skipped;
};

/// Compiles every kernel that calls for `problems` may launch, each once, and writes it to `directory`, which is made if
/// need be; kernels that are there are kept. Several processes may write to one directory. `progress`, if there is one, is
/// called with the number of kernels done and their total, from one thread at a time, and may throw to end the work.
///
/// Throws InvalidArgument for a problem that breaks a rule (problems[1].heads) and for negative jobs, Unsupported where no
/// GPU engine takes a problem or there is no compiler for a target, CompileError, and std::runtime_error where the
/// directory cannot be written.
VICUS_API CompileResult compile(std::span<const Problem> problems, const std::string& directory,
                                const CompileOptions& options,
                                const std::function<void(std::size_t done, std::size_t total)>& progress = {});

}  // namespace vicus

#endif  // VICUS_COMPILE_H_
