// Arrays between files and tensor views. A place is `file.npy` or `file.safetensors[:name]`; inputs are recognised by
// their content, outputs by their extension.
#ifndef VICUS_CLI_ARRAYS_H_
#define VICUS_CLI_ARRAYS_H_

#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cli/files.h"
#include "vicus/tensor.h"

namespace vicus::cli {

/// An array in memory, contiguous, aligned to its elements. Keeps what it points into alive.
class Array {
 public:
  Array() = default;
  Array(std::shared_ptr<const std::vector<std::byte>> storage, std::span<const std::byte> data, DType dtype,
        std::vector<std::int64_t> shape)
      : storage_(std::move(storage)), data_(data), dtype_(dtype), shape_(std::move(shape)) {}

  /// Absent for a default-made array.
  [[nodiscard]] ConstTensorView view() const;
  [[nodiscard]] std::span<const std::byte> bytes() const { return data_; }

 private:
  std::shared_ptr<const std::vector<std::byte>> storage_;
  std::span<const std::byte> data_;
  DType dtype_ = DType::float32;
  std::vector<std::int64_t> shape_;
};

/// Reads arrays; a file that is named several times is read once.
class ArrayReader {
 public:
  /// `void_is_bfloat16`: how .npy elements of type '<V2' are meant (npy.h).
  ArrayReader(Files& files, bool void_is_bfloat16) : files_(files), void_is_bfloat16_(void_is_bfloat16) {}

  /// The array at `place`; `name` is looked up in a safetensors file that `place` gives no name for. Errors name
  /// `argument`: IoError, InvalidArgument, FormatError.
  Array read(const std::string& argument, const std::string& place, const std::string& name);

 private:
  using Bytes = std::shared_ptr<const std::vector<std::byte>>;
  Bytes contents(const std::string& argument, const std::string& path);

  Files& files_;
  bool void_is_bfloat16_;
  std::map<std::string, Bytes> contents_;
};

struct OutputArray {
  std::string argument;  ///< option that named the place
  std::string place;
  std::string name;  ///< in a safetensors file whose place gives no name
  DType dtype = DType::float32;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> data;
};

/// Throws what `write_arrays` would throw about names and directories, before there is anything to write.
void check_outputs(Files& files, std::span<const OutputArray> outputs);

/// Writes all arrays or none. Arrays of one safetensors file go there together.
void write_arrays(Files& files, std::span<const OutputArray> outputs);

}  // namespace vicus::cli

#endif  // VICUS_CLI_ARRAYS_H_
