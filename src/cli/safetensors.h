// The safetensors format: 8 bytes of header length, a JSON object of names, types, shapes and offsets, the elements.
//
// As strict as the format's own page: offsets cover the elements without gap or overlap, sizes agree with shapes, no name
// comes twice. Tensors of types that vicus does not compute with may be in the file; they are listed without a dtype.
#ifndef VICUS_CLI_SAFETENSORS_H_
#define VICUS_CLI_SAFETENSORS_H_

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cli/format.h"

namespace vicus::cli {

struct SafetensorsEntry {
  std::string name;
  std::string type;            ///< as in the file: "F32", "BF16", "I64"
  std::optional<DType> dtype;  ///< absent for types that are no attention operand
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;
};

/// All tensors, in the order of their data. Throws FormatError.
[[nodiscard]] std::vector<SafetensorsEntry> parse_safetensors(std::span<const std::byte> bytes);

struct TensorToWrite {
  std::string name;
  DType dtype = DType::float32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;
};

/// Whether a tensor may be called so: UTF-8, and not the name that the format keeps for itself.
[[nodiscard]] bool valid_tensor_name(const std::string& name);

/// Everything of a file before its elements, a multiple of 8 bytes. Puts `tensors` into the order in which their data
/// must follow: wide elements first, so that each is aligned.
[[nodiscard]] std::vector<std::byte> safetensors_header(std::vector<TensorToWrite>& tensors);

}  // namespace vicus::cli

#endif  // VICUS_CLI_SAFETENSORS_H_
