// What the plain kernels are called with: the arguments of the forward kernel, scales as wide as float64 storage needs,
// and gradients. Plain C++ for the host compiler and NVRTC alike.
#ifndef VICUS_GPU_PLAIN_ARGS_H_
#define VICUS_GPU_PLAIN_ARGS_H_

#include "args.h"

namespace vicus::gpu {

/// Grid: x over query tiles as in `Work`, y over slices of kWide columns of the output.
struct PlainForwardArgs {
  ForwardArgs forward;    ///< without its scale
  double scale_log2 = 1;  ///< scale * log2(e)
};

/// In `forward`: the inputs, and the output and logsumexp of the forward call; logsumexp, its gradient and delta are
/// float32, or float64 for float64 storage. Absent gradients have no data.
///
/// Grids: plain_delta x over rows, kThreads / 8 a block, y over batch; plain_backward_queries x over query tiles (forward.work);
/// plain_backward_keys x over key tiles (key_work, head_blocks = heads_kv); plain_backward_additional x over batch, then
/// key/value heads, then tiles of kTileKv tokens (fastest); all three y over slices of kWide columns of the gradients;
/// plain_backward_bias x over heads, then entries of the table (fastest).
struct PlainBackwardArgs {
  ForwardArgs forward;
  Rows grad_output, grad_logsumexp;
  Rows delta;  ///< scratch [B, *X, H]: output . grad_output - grad_logsumexp
  Rows grad_query, grad_key, grad_value, grad_additional_keys, grad_additional_values;
  Bias grad_bias;  ///< of the type of `forward.bias`
  Work key_work;
  TileOrder key_order;
  int batch = 1;
  int cells = 1;  ///< sequences times residue classes, of all batch entries
  double scale = 1, scale_log2 = 1;
};

}  // namespace vicus::gpu

#endif  // VICUS_GPU_PLAIN_ARGS_H_
