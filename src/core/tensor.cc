#include "vicus/tensor.h"

#include <algorithm>

#include "vicus/error.h"

namespace vicus {

std::size_t dtype_size(DType dtype) noexcept {
  switch (dtype) {
    case DType::float64:
      return 8;
    case DType::float32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      return 2;
  }
  return 0;
}

std::string_view dtype_name(DType dtype) noexcept {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
  }
  return "unknown";
}

DType parse_dtype(std::string_view name, const std::string& argument) {
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    if (dtype_name(dtype) == name) return dtype;
  }
  throw InvalidArgument(argument, "'" + std::string(name) + "'", "float32, float64, bfloat16, float16");
}

TensorLayout::TensorLayout(std::span<const std::int64_t> shape) : dims_(static_cast<int>(shape.size())) {
  if (shape.size() > kMaxDims) {
    throw InvalidArgument("shape", std::to_string(shape.size()) + " dimensions", "at most " + std::to_string(kMaxDims));
  }
  std::int64_t step = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (shape[i] < 0) throw InvalidArgument("shape[" + std::to_string(i) + "]", std::to_string(shape[i]), ">= 0");
    shape_[i] = shape[i];
    stride_[i] = step;
    if (__builtin_mul_overflow(step, std::max<std::int64_t>(shape[i], 1), &step)) {
      throw InvalidArgument("shape", "a product beyond 64 bits", "at most 2^63 - 1 elements");
    }
  }
}

TensorLayout::TensorLayout(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides)
    : TensorLayout(shape) {
  if (strides.size() != shape.size()) {
    throw InvalidArgument("strides", std::to_string(strides.size()) + " values",
                          "as many as dimensions: " + std::to_string(shape.size()));
  }
  std::copy(strides.begin(), strides.end(), stride_.begin());
}

std::int64_t TensorLayout::numel() const noexcept {
  std::int64_t n = 1;
  for (const std::int64_t extent : shape()) n *= extent;
  return n;
}

}  // namespace vicus
