// Kernel text to machine code: from the disk cache, or through NVRTC. Needs no GPU.
#ifndef VICUS_JIT_COMPILE_H_
#define VICUS_JIT_COMPILE_H_

#include <string>

#include "jit/source.h"

namespace vicus::jit {

/// sm_80 is {8, 0}.
struct Arch {
  int major = 0, minor = 0;
  friend bool operator==(const Arch&, const Arch&) = default;
};

/// "sm_80".
[[nodiscard]] std::string name_of(Arch arch);

/// What the compiler says of the kernel. Bytes of spills and stack are per thread.
struct CompileReport {
  std::string kernel;  // the name of the __global__ function
  int registers = 0, stack_bytes = 0, spill_store_bytes = 0, spill_load_bytes = 0;
  int shared_bytes = 0;  // static
  double seconds = 0;    // in the compiler; 0 from the cache
  bool from_cache = false;
  std::string log;
};

/// The machine code of `source`: out of VICUS_PREBUILT_DIR, the user's cache, or the compiler. A compiler too old for
/// `arch` compiles for the nearest before it of the same major version, which runs on it. Throws CompileError, or Unsupported where there is no compiler for it.
[[nodiscard]] std::string cubin(const Source& source, Arch arch, CompileReport* report = nullptr);

/// Whether there are a compiler and a cache that keeps what it makes.
[[nodiscard]] bool compiles_into_cache();

/// Throws Unsupported unless there is a compiler for exactly `arch`.
void require_compiler(Arch arch);

/// Compiles `source` into `directory`, for a VICUS_PREBUILT_DIR: a machine that has it there needs no compiler, or has
/// another version. Throws as `cubin`, and std::runtime_error where the directory cannot be written.
CompileReport prebuild(const Source& source, Arch arch, const std::string& directory);

}  // namespace vicus::jit

#endif  // VICUS_JIT_COMPILE_H_
