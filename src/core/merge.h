// What the engines implement of merging. `merge.cc` checks the tensors and calls; an engine may trust everything it is
// given.
#ifndef VICUS_CORE_MERGE_H_
#define VICUS_CORE_MERGE_H_

#include <cstdint>
#include <span>

#include "vicus/tensor.h"

namespace vicus {

/// The parts of one merge, of one shape [B, *X, H, Dv]; at least one.
struct MergeParts {
  std::span<const ConstTensorView> outputs, logsumexps;

  [[nodiscard]] DType dtype() const { return outputs[0].dtype(); }
  [[nodiscard]] std::size_t count() const { return outputs.size(); }
  [[nodiscard]] std::span<const std::int64_t> shape() const { return outputs[0].shape(); }
  /// Without features: row r of every tensor is (batch, tokens, head) r of this shape.
  [[nodiscard]] std::span<const std::int64_t> row_shape() const { return shape().first(shape().size() - 1); }
  [[nodiscard]] std::int64_t width() const { return shape().back(); }
  [[nodiscard]] std::int64_t rows() const {
    std::int64_t rows = 1;
    for (const std::int64_t extent : row_shape()) rows *= extent;
    return rows;
  }
};

/// Gradients of the parts; spans may be empty, and hold absent views.
struct MergeGradients {
  std::span<const TensorView> outputs, logsumexps;
};

struct MergeEngine {
  void (*forward)(const MergeParts& parts, const TensorView& output, const TensorView& logsumexp, void* stream);
  void (*backward)(const MergeParts& parts, const ConstTensorView& grad_output, const ConstTensorView& grad_logsumexp,
                   const MergeGradients& gradients, void* stream);
};

namespace cpu {
extern const MergeEngine kMerge;
}
namespace gpu {
extern const MergeEngine kMerge;
}

}  // namespace vicus

#endif  // VICUS_CORE_MERGE_H_
