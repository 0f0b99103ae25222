// PyTorch's tensors as the core's views, through the stable ABI. Views are read in place; new tensors are contiguous.
#ifndef VICUS_TORCH_TENSORS_H_
#define VICUS_TORCH_TENSORS_H_

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "vicus/device.h"
#include "vicus/tensor.h"

namespace vicus::binding {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<std::int64_t>;

/// Where tensors are: CPU memory, or that of a CUDA device.
struct Place {
  bool cuda = false;
  std::int32_t device = 0;
};
[[nodiscard]] Place place_of(const Tensor& tensor);

/// View of a tensor that is read, of any strides; an absent tensor is an absent view. `name` is for errors:
/// InvalidArgument on an element type the core does not know.
[[nodiscard]] ConstTensorView view(const char* name, const Tensor& tensor);
[[nodiscard]] ConstTensorView view(const char* name, const MaybeTensor& tensor);
[[nodiscard]] std::vector<ConstTensorView> views(const char* name, const std::vector<Tensor>& tensors);

/// Views of tensors whose last dimension the core wants contiguous: in place where it is, otherwise of a copy that lives
/// as long as this object.
class Rows {
 public:
  [[nodiscard]] ConstTensorView operator()(const char* name, const Tensor& tensor);
  [[nodiscard]] ConstTensorView operator()(const char* name, const MaybeTensor& tensor);
  [[nodiscard]] std::vector<ConstTensorView> operator()(const char* name, const std::vector<Tensor>& tensors);

 private:
  std::vector<Tensor> copies_;
};

/// View of a tensor that is written.
[[nodiscard]] TensorView written(const Tensor& tensor);

/// A new tensor, contiguous, not initialised.
[[nodiscard]] Tensor empty(const Place& place, std::span<const std::int64_t> shape, DType dtype);
/// PyTorch's current stream at a place, null for the CPU, with scratch memory from PyTorch's allocator for the calls that this
/// thread makes while the object lives.
class Queue : public ScratchSource {
 public:
  explicit Queue(const Place& place);
  [[nodiscard]] void* stream() const { return stream_; }

  void* take(std::size_t bytes, void* stream) override;
  void give_back(void* data, void* stream) noexcept override;

 private:
  Place place_;
  void* stream_;
  std::vector<Tensor> taken_;
};

/// A gradient like `of`, or an empty tensor of type `otherwise` where it is not wanted or there is nothing to
/// differentiate.
struct Gradient {
  Tensor tensor;
  TensorView view;  ///< absent when not wanted
};
[[nodiscard]] Gradient gradient_of(const Place& place, const ConstTensorView& of, bool wanted, DType otherwise);

/// The element type of a logsumexp of this element type.
[[nodiscard]] inline DType logsumexp_dtype(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

/// Elements of a 1-D tensor of int32 or int64 on the CPU (absent: none). Throws InvalidArgument on anything else.
[[nodiscard]] Ints integers(const char* name, const MaybeTensor& tensor);

/// Where the elements of a 1-D contiguous tensor of int32 at `place`, a GPU, are (absent: none). Throws InvalidArgument on
/// anything else.
[[nodiscard]] std::span<const std::int32_t> device_list(const char* name, const MaybeTensor& tensor,
                                                        const Place& place);

}  // namespace vicus::binding

#endif  // VICUS_TORCH_TENSORS_H_
