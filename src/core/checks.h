// Checks of tensors against the shapes that a problem fixes. Every operator checks all of its tensors before it writes.
#ifndef VICUS_CORE_CHECKS_H_
#define VICUS_CORE_CHECKS_H_

#include <cstdint>
#include <span>
#include <string>

#include "vicus/attention.h"
#include "vicus/tensor.h"

namespace vicus {

/// "[1, 56, 56, 8, 64]".
[[nodiscard]] std::string shape_text(std::span<const std::int64_t> shape);
[[nodiscard]] inline std::string shape_text(const TensorLayout& layout) { return shape_text(layout.shape()); }

void require_present(const std::string& name, const ConstTensorView& tensor);
/// The view must have this shape, and data unless it is empty.
void require_shape(const std::string& name, const ConstTensorView& tensor, std::span<const std::int64_t> shape);
void require_dtype(const std::string& name, const ConstTensorView& tensor, std::span<const DType> allowed);
/// Elements of one row (the last dimension) must be adjacent.
void require_contiguous_rows(const std::string& name, const ConstTensorView& tensor);
/// No two elements of an output may share memory.
void require_distinct(const std::string& name, const ConstTensorView& tensor);

struct NamedView {
  const char* name;
  ConstTensorView view;
};
/// No output may begin where another output or an input begins.
void require_separate(std::span<const NamedView> outputs, std::span<const NamedView> inputs);

/// Shape, dtype and contiguous rows of an input; for an output also distinct elements.
void require_input(const std::string& name, const ConstTensorView& tensor, std::span<const std::int64_t> shape,
                   DType dtype);
void require_output(const std::string& name, const ConstTensorView& tensor, std::span<const std::int64_t> shape,
                    DType dtype);
/// A logsumexp or its gradient: float32, or float64 where the problem is.
void require_logsumexp(const std::string& name, const ConstTensorView& tensor, std::span<const std::int64_t> shape,
                       DType dtype, bool output);

/// Everything `forward` is given.
void check_forward(const Problem& problem, const AttentionInputs& inputs, const TensorView& output,
                   const TensorView& logsumexp);
/// Everything `backward` is given.
void check_backward(const Problem& problem, const AttentionInputs& inputs, const AttentionGradInputs& grad_inputs,
                    const AttentionGradients& gradients);

}  // namespace vicus

#endif  // VICUS_CORE_CHECKS_H_
