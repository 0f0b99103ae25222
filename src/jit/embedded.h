// The text of the GPU kernels, carried inside the library. cmake/embed.cmake writes the table at build time, out of
// src/gpu/*.cuh, *.cu, args.h and include/vicus/geometry.h.
#ifndef VICUS_JIT_EMBEDDED_H_
#define VICUS_JIT_EMBEDDED_H_

#include <span>

namespace vicus::jit {

/// `name` is what an #include spells: "softmax.cuh" (files of src/gpu lie side by side), "vicus/geometry.h".
struct EmbeddedFile {
  const char *name, *text;
};

[[nodiscard]] std::span<const EmbeddedFile> embedded_files();

}  // namespace vicus::jit

#endif  // VICUS_JIT_EMBEDDED_H_
