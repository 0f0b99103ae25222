// The public operators: check everything, then hand over to the plan's engine.
#include "core/checks.h"
#include "core/engines.h"
#include "gpu/engine.h"
#include "vicus/attention.h"
#include "vicus/prepare.h"

namespace vicus {

void forward(const Plan& plan, const AttentionInputs& inputs, const TensorView& output, const TensorView& logsumexp,
             void* stream) {
  check_forward(plan.problem, inputs, output, logsumexp);
  if (plan.engine == Engine::reference) {
    reference::forward(plan.problem, inputs, output, logsumexp);
  } else if (runs_on_gpu(plan.engine)) {
    gpu::forward(plan, inputs, output, logsumexp, stream);
  } else {
    cpu::forward(plan, inputs, output, logsumexp);
  }
}

void backward(const Plan& plan, const AttentionInputs& inputs, const AttentionGradInputs& grad_inputs,
              const AttentionGradients& gradients, void* stream) {
  check_backward(plan.problem, inputs, grad_inputs, gradients);
  if (plan.engine == Engine::reference) {
    reference::backward(plan.problem, inputs, grad_inputs, gradients);
  } else if (runs_on_gpu(plan.engine)) {
    gpu::backward(plan, inputs, grad_inputs, gradients, stream);
  } else {
    cpu::backward(plan, inputs, grad_inputs, gradients);
  }
}

void prepare(const Plan& plan, const CallSet& calls, int device) {
  if (runs_on_gpu(plan.engine)) gpu::prepare(plan, calls, device);
}

void neighborhood_attention(const ConstTensorView& query, const ConstTensorView& key, const ConstTensorView& value,
                            const TensorView& output, const Neighborhood& mask, std::optional<double> scale,
                            const TensorView& logsumexp) {
  const Plan plan = choose_plan(neighborhood_problem(query, key, value, mask, scale));
  forward(plan, {.query = query, .key = key, .value = value}, output, logsumexp);
}

void attention(const ConstTensorView& query, const ConstTensorView& key, const ConstTensorView& value,
               const TensorView& output, const Dense& mask, std::optional<double> scale, const TensorView& logsumexp) {
  const Plan plan = choose_plan(dense_problem(query, key, value, mask, scale));
  forward(plan, {.query = query, .key = key, .value = value}, output, logsumexp);
}

}  // namespace vicus
