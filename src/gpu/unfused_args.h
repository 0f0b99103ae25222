// What the kernels of the unfused operators are called with. Plain C++ for the host compiler and NVRTC alike.
#ifndef VICUS_GPU_UNFUSED_ARGS_H_
#define VICUS_GPU_UNFUSED_ARGS_H_

#include "args.h"

namespace vicus::gpu {

/// Tensors as heads-last ones [B, *X, H, ...] by their strides, whatever the order in memory. `rows` belong to queries,
/// `keys` to keys, `additional` [B, T, Hkv, D]; `scores` has a row of slots per query. What a kernel writes is, in the
/// order of the kernels that unfused.cuh lists: scores, rows, keys, additional, bias.
struct UnfusedArgs {
  Rows rows, keys, additional, scores;
  Bias bias;               ///< relative; no data where there is none
  int len[3] = {1, 1, 1};  ///< trailing axes last
  int batch = 1, heads = 1, heads_kv = 1;
  int tokens = 0;            ///< additional ones
  bool zero_unused = false;  ///< slots without a key become 0 instead of -inf
};

}  // namespace vicus::gpu

#endif  // VICUS_GPU_UNFUSED_ARGS_H_
