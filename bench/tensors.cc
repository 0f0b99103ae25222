#include "tensors.h"

#include <random>

#include "core/numbers.h"

namespace vicus::bench {
namespace {

DType logsumexp_dtype(const Problem& problem) {
  return problem.dtype == DType::float64 ? DType::float64 : DType::float32;
}

}  // namespace

Tensor::Tensor(DType dtype, std::span<const std::int64_t> shape)
    : dtype_(dtype),
      layout_(shape),
      lines_((static_cast<std::size_t>(layout_.numel()) * dtype_size(dtype) + sizeof(Line) - 1) / sizeof(Line)) {}

void Tensor::fill_normal(std::uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < layout_.numel(); ++i) {
    store_element(lines_.data(), dtype_, i, static_cast<double>(normal(generator)));
  }
}

std::vector<double> Tensor::read(std::int64_t offset, std::int64_t count) const {
  std::vector<double> values(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    values[static_cast<std::size_t>(i)] = load_element(lines_.data(), dtype_, offset + i);
  }
  return values;
}

ProblemTensors::ProblemTensors(const Problem& problem)
    : query(problem.dtype, problem.query_shape()),
      key(problem.dtype, problem.key_shape()),
      value(problem.dtype, problem.value_shape()),
      grad_output(problem.dtype, problem.output_shape()),
      output(problem.dtype, problem.output_shape()),
      logsumexp(logsumexp_dtype(problem), problem.logsumexp_shape()),
      grad_query(problem.dtype, problem.query_shape()),
      grad_key(problem.dtype, problem.key_shape()),
      grad_value(problem.dtype, problem.value_shape()) {
  std::uint64_t seed = 1;
  for (Tensor* tensor : {&query, &key, &value, &grad_output}) tensor->fill_normal(seed++);
}

AttentionInputs ProblemTensors::inputs() const {
  AttentionInputs inputs;
  inputs.query = query.view();
  inputs.key = key.view();
  inputs.value = value.view();
  return inputs;
}

AttentionGradInputs ProblemTensors::grad_inputs() const {
  AttentionGradInputs grad_inputs;
  grad_inputs.output = output.view();
  grad_inputs.logsumexp = logsumexp.view();
  grad_inputs.grad_output = grad_output.view();
  return grad_inputs;
}

AttentionGradients ProblemTensors::gradients() {
  AttentionGradients gradients;
  gradients.query = grad_query.view();
  gradients.key = grad_key.view();
  gradients.value = grad_value.view();
  return gradients;
}

}  // namespace vicus::bench
