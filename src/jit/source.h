// What is handed to the compiler for one kernel: constants of the problem, then embedded text that reads them.
#ifndef VICUS_JIT_SOURCE_H_
#define VICUS_JIT_SOURCE_H_

#include <string>
#include <vector>

#include "jit/embedded.h"

namespace vicus::jit {

/// A program with exactly one __global__ function. `file` is "forward.cu", of src/gpu, or empty, when the prologue is
/// all of it; `prologue` is put before it: "constexpr int kHeadDim = 64; ...". `arch_specific`: compiled for sm_90a
/// rather than sm_90, whose instructions (wgmma) no other architecture has.
struct Source {
  std::string file{}, prologue{};
  bool arch_specific = false;
};

/// The name in messages.
[[nodiscard]] std::string name_of(const Source& source);

/// The text to compile: the prologue, and an #include of the file.
[[nodiscard]] std::string text_of(const Source& source);

/// The embedded files that `text` includes, directly or through another; sorted by name.
[[nodiscard]] std::vector<EmbeddedFile> headers_of(const std::string& text);

}  // namespace vicus::jit

#endif  // VICUS_JIT_SOURCE_H_
