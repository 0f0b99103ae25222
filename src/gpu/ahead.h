// The backward pass of training, compiled while the forward pass is.
#ifndef VICUS_GPU_AHEAD_H_
#define VICUS_GPU_AHEAD_H_

#include "vicus/plan.h"

namespace vicus::gpu {

/// Has the kernels of the usual backward call of `plan` compiled in the background, each once in a process. `bias_type`: of
/// the bias, if there is one.
void compile_gradients_ahead(const Plan& plan, DType bias_type);

}  // namespace vicus::gpu

#endif  // VICUS_GPU_AHEAD_H_
