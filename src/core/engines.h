// What each engine implements. `api.cc` checks the tensors and calls; an engine may trust everything it is given.
#ifndef VICUS_CORE_ENGINES_H_
#define VICUS_CORE_ENGINES_H_

#include "vicus/attention.h"

namespace vicus {

namespace reference {
void forward(const Problem& problem, const AttentionInputs& in, const TensorView& output, const TensorView& logsumexp);
void backward(const Problem& problem, const AttentionInputs& in, const AttentionGradInputs& grads,
              const AttentionGradients& out);
}  // namespace reference

namespace cpu {
void forward(const Plan& plan, const AttentionInputs& in, const TensorView& output, const TensorView& logsumexp);
void backward(const Plan& plan, const AttentionInputs& in, const AttentionGradInputs& grads,
              const AttentionGradients& out);
}  // namespace cpu

}  // namespace vicus

#endif  // VICUS_CORE_ENGINES_H_
