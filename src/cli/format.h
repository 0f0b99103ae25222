// What the readers of array files share: the array they find, and the error they throw.
//
// Readers are own code because no maintained C++ library packaged by Debian reads .npy or .safetensors with bfloat16 and
// bounded memory. They parse bytes already in memory, trust no number in them, and point into them instead of copying.
#ifndef VICUS_CLI_FORMAT_H_
#define VICUS_CLI_FORMAT_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <vector>

#include "vicus/tensor.h"

namespace vicus::cli {

/// The bytes are not what they should be. `what()` is half a sentence about the file: "ends inside its header".
class FormatError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An array inside the bytes of a file: little-endian, without gaps, maybe unaligned.
struct FileArray {
  DType dtype = DType::float32;
  std::vector<std::int64_t> shape;
  bool fortran_order = false;  ///< first axis contiguous instead of the last
  std::span<const std::byte> data;
};

/// Product of `shape`, or nothing when the extents that are not zero overflow 63 bits: an array with a zero extent must
/// not smuggle in other extents that wrap around.
[[nodiscard]] inline std::optional<std::uint64_t> checked_count(std::span<const std::int64_t> shape) {
  std::uint64_t product = 1;
  bool zero = false;
  for (const std::int64_t extent : shape) {
    if (extent < 0) return std::nullopt;
    if (extent == 0) {
      zero = true;
    } else if (__builtin_mul_overflow(product, static_cast<std::uint64_t>(extent), &product) || product >> 63 != 0) {
      return std::nullopt;
    }
  }
  return zero ? 0 : product;
}

/// Bytes of `count` elements, or nothing when that overflows 63 bits.
[[nodiscard]] inline std::optional<std::uint64_t> checked_bytes(std::uint64_t count, std::uint64_t element_size) {
  std::uint64_t bytes = 0;
  if (__builtin_mul_overflow(count, element_size, &bytes) || bytes >> 63 != 0) return std::nullopt;
  return bytes;
}

}  // namespace vicus::cli

#endif  // VICUS_CLI_FORMAT_H_
