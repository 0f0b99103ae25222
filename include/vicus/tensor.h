// Views over the caller's memory: a pointer, an element type, a shape and strides. Nothing here owns or copies data.
#ifndef VICUS_TENSOR_H_
#define VICUS_TENSOR_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

#include "vicus/export.h"

namespace vicus {

/// Storage types. Arithmetic is float32 for all but float64, which is computed in float64.
enum class DType : std::uint8_t { float32, float64, bfloat16, float16 };

/// Bytes of one element.
[[nodiscard]] VICUS_API std::size_t dtype_size(DType dtype) noexcept;
/// "float32", "float64", "bfloat16" or "float16".
[[nodiscard]] VICUS_API std::string_view dtype_name(DType dtype) noexcept;
/// The inverse of `dtype_name`. Throws InvalidArgument naming `argument`.
[[nodiscard]] VICUS_API DType parse_dtype(std::string_view name, const std::string& argument = "dtype");

namespace detail {
template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::float64;
};
}  // namespace detail

/// Most dimensions a view can have: [batch, 3 token axes, heads, features].
inline constexpr int kMaxDims = 6;

/// Shape and strides, in elements. Strides may be anything (also zero or negative) but operators ask for a contiguous
/// last dimension, and refuse outputs whose elements overlap.
class VICUS_API TensorLayout {
 public:
  TensorLayout() = default;
  /// Contiguous (row-major). Throws InvalidArgument on more than kMaxDims dimensions or a negative extent.
  explicit TensorLayout(std::span<const std::int64_t> shape);
  /// With explicit strides. Throws InvalidArgument also when the two differ in length.
  TensorLayout(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides);

  [[nodiscard]] int dims() const noexcept { return dims_; }
  [[nodiscard]] std::int64_t size(int dim) const noexcept { return shape_[static_cast<std::size_t>(dim)]; }
  [[nodiscard]] std::int64_t stride(int dim) const noexcept { return stride_[static_cast<std::size_t>(dim)]; }
  [[nodiscard]] std::span<const std::int64_t> shape() const noexcept {
    return {shape_.data(), static_cast<std::size_t>(dims_)};
  }
  [[nodiscard]] std::span<const std::int64_t> strides() const noexcept {
    return {stride_.data(), static_cast<std::size_t>(dims_)};
  }
  /// Elements in the view: the product of the shape.
  [[nodiscard]] std::int64_t numel() const noexcept;

 private:
  int dims_ = 0;
  std::array<std::int64_t, kMaxDims> shape_{}, stride_{};
};

/// A view. `Pointer` is `void*` (TensorView, written) or `const void*` (ConstTensorView, read). A default-made view is
/// absent: how optional tensors are left out.
template <class Pointer>
class BasicTensorView : public TensorLayout {
 public:
  BasicTensorView() = default;
  BasicTensorView(Pointer data, DType dtype, TensorLayout layout)
      : TensorLayout(layout), data_(data), dtype_(dtype), present_(true) {}
  BasicTensorView(Pointer data, DType dtype, std::initializer_list<std::int64_t> shape)
      : BasicTensorView(data, dtype, TensorLayout(std::span(shape.begin(), shape.size()))) {}
  BasicTensorView(Pointer data, DType dtype, std::initializer_list<std::int64_t> shape,
                  std::initializer_list<std::int64_t> strides)
      : BasicTensorView(
            data, dtype,
            TensorLayout(std::span(shape.begin(), shape.size()), std::span(strides.begin(), strides.size()))) {}
  /// Contiguous view of float or double memory.
  template <class T, DType kType = detail::DTypeOf<std::remove_const_t<T>>::value>
  BasicTensorView(T* data, std::initializer_list<std::int64_t> shape) : BasicTensorView(data, kType, shape) {}
  /// A view that is written can be read.
  template <class Other>
    requires(!std::is_same_v<Other, Pointer> && std::is_convertible_v<Other, Pointer>)
  BasicTensorView(const BasicTensorView<Other>& other)  // NOLINT(google-explicit-constructor)
      : TensorLayout(other), data_(other.data()), dtype_(other.dtype()), present_(other.present()) {}

  [[nodiscard]] Pointer data() const noexcept { return data_; }
  [[nodiscard]] DType dtype() const noexcept { return dtype_; }
  [[nodiscard]] bool present() const noexcept { return present_; }
  explicit operator bool() const noexcept { return present_; }

 private:
  Pointer data_ = nullptr;
  DType dtype_ = DType::float32;
  bool present_ = false;
};

using TensorView = BasicTensorView<void*>;
using ConstTensorView = BasicTensorView<const void*>;

}  // namespace vicus

#endif  // VICUS_TENSOR_H_
