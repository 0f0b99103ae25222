// NVIDIA's run-time compiler, opened at run time. It needs no GPU and no CUDA toolkit: the one that PyTorch's wheels
// install is enough.
//
// Looked for in this order; the first that opens is used for the life of the process:
//   1. VICUS_NVRTC, a library or its directory; nothing else is tried then
//   2. one that the process has open already
//   3. directories given by `set_nvrtc_directory` (the Python package gives those of the installed wheels)
//   4. CUDA_HOME, CUDA_PATH
//   5. the system's loader, /usr/local/cuda
#ifndef VICUS_JIT_NVRTC_H_
#define VICUS_JIT_NVRTC_H_

#include <cstddef>
#include <string>
#include <vector>

#include "jit/embedded.h"

namespace vicus::jit {

class Nvrtc {
 public:
  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  /// Which of the places above it was found in: "VICUS_NVRTC", "the process", "the Python packages", "CUDA_HOME", ...
  [[nodiscard]] const std::string& found_in() const noexcept { return found_in_; }
  /// "13.0".
  [[nodiscard]] const std::string& version() const noexcept { return version_; }
  /// What it compiles for: 80, 86, 90, ...
  [[nodiscard]] const std::vector<int>& architectures() const noexcept { return architectures_; }

  struct Result {
    std::string cubin, log;
  };
  /// Compiles `text`; `headers` are what it may include, by exactly these names. Throws CompileError.
  [[nodiscard]] Result compile(const std::string& name, const std::string& text,
                               const std::vector<EmbeddedFile>& headers, const std::vector<std::string>& options) const;

 private:
  friend class NvrtcSearch;
  using Program = struct _nvrtcProgram*;
  class Job;

  std::string path_, found_in_, version_;
  bool caches_ = false;  // since 12.9, and what comes from its cache has no report of ptxas: the cache is switched off
  std::vector<int> architectures_;

  int (*nvrtcVersion)(int* major, int* minor) = nullptr;
  int (*nvrtcGetNumSupportedArchs)(int* count) = nullptr;
  int (*nvrtcGetSupportedArchs)(int* archs) = nullptr;
  const char* (*nvrtcGetErrorString)(int) = nullptr;
  int (*nvrtcCreateProgram)(Program*, const char* text, const char* name, int headers, const char* const* texts,
                            const char* const* names) = nullptr;
  int (*nvrtcDestroyProgram)(Program*) = nullptr;
  int (*nvrtcCompileProgram)(Program, int count, const char* const* options) = nullptr;
  int (*nvrtcGetProgramLogSize)(Program, std::size_t*) = nullptr;
  int (*nvrtcGetProgramLog)(Program, char*) = nullptr;
  int (*nvrtcGetCUBINSize)(Program, std::size_t*) = nullptr;
  int (*nvrtcGetCUBIN)(Program, char*) = nullptr;
};

/// Throws Unsupported where there is none, naming the places; a later call looks again.
[[nodiscard]] const Nvrtc& nvrtc();

/// Adds a directory to place 3. Has no effect on a compiler that was found already.
void set_nvrtc_directory(const std::string& directory);

}  // namespace vicus::jit

#endif  // VICUS_JIT_NVRTC_H_
