// NumPy's .npy format, versions 1 to 3: magic, version, header length, a Python dictionary literal, the elements.
#ifndef VICUS_CLI_NPY_H_
#define VICUS_CLI_NPY_H_

#include <cstddef>
#include <span>
#include <vector>

#include "cli/format.h"

namespace vicus::cli {

/// Whether the bytes begin as a .npy file does.
[[nodiscard]] bool is_npy(std::span<const std::byte> bytes);

/// The array of a .npy file. ml_dtypes stores bfloat16 as '<V2', two bytes of no type: they are read as bfloat16 if
/// `void_is_bfloat16`, and refused otherwise. Throws FormatError.
[[nodiscard]] FileArray parse_npy(std::span<const std::byte> bytes, bool void_is_bfloat16);

/// Everything of a .npy file before its elements; a multiple of 64 bytes, as NumPy writes it.
[[nodiscard]] std::vector<std::byte> npy_header(DType dtype, std::span<const std::int64_t> shape);

}  // namespace vicus::cli

#endif  // VICUS_CLI_NPY_H_
