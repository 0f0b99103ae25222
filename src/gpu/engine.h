// The GPU engine. Tensors are device memory; work is queued on the caller's stream.
#ifndef VICUS_GPU_ENGINE_H_
#define VICUS_GPU_ENGINE_H_

#include "vicus/attention.h"
#include "vicus/prepare.h"

namespace vicus::gpu {

void forward(const Plan& plan, const AttentionInputs& in, const TensorView& output, const TensorView& logsumexp,
             void* stream);

void backward(const Plan& plan, const AttentionInputs& in, const AttentionGradInputs& grads,
              const AttentionGradients& out, void* stream);

/// As vicus::prepare.
void prepare(const Plan& plan, const CallSet& calls, int device);

}  // namespace vicus::gpu

#endif  // VICUS_GPU_ENGINE_H_
