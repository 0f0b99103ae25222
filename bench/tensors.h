// The tensors of one problem, in memory of their own, contiguous and heads last.
#ifndef VICUS_BENCH_TENSORS_H_
#define VICUS_BENCH_TENSORS_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "vicus/attention.h"
#include "vicus/problem.h"
#include "vicus/tensor.h"

namespace vicus::bench {

/// Memory of one contiguous tensor, aligned as PyTorch's and NumPy's own allocators align. Every page is touched when it is made, so that timed and measured calls find it there.
class Tensor {
 public:
  Tensor(DType dtype, std::span<const std::int64_t> shape);
  /// Normally distributed elements that `seed` determines.
  void fill_normal(std::uint64_t seed);
  [[nodiscard]] TensorView view() { return {lines_.data(), dtype_, layout_}; }
  [[nodiscard]] ConstTensorView view() const { return {lines_.data(), dtype_, layout_}; }
  /// Elements [offset, offset + count) as doubles.
  [[nodiscard]] std::vector<double> read(std::int64_t offset, std::int64_t count) const;

 private:
  DType dtype_;
  TensorLayout layout_;
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<Line> lines_;
};

/// Inputs are random and never change; outputs are what the last call left.
struct ProblemTensors {
  explicit ProblemTensors(const Problem& problem);

  [[nodiscard]] AttentionInputs inputs() const;
  [[nodiscard]] AttentionGradInputs grad_inputs() const;
  [[nodiscard]] AttentionGradients gradients();

  Tensor query, key, value, grad_output;                       ///< inputs
  Tensor output, logsumexp, grad_query, grad_key, grad_value;  ///< outputs
};

}  // namespace vicus::bench

#endif  // VICUS_BENCH_TENSORS_H_
