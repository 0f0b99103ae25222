// What the merge kernels are called with. Plain C++ for the host compiler and NVRTC alike.
#ifndef VICUS_GPU_MERGE_ARGS_H_
#define VICUS_GPU_MERGE_ARGS_H_

#include "args.h"

namespace vicus::gpu {

inline constexpr int kMaxMergeParts = 16;

/// Tensors [B, *X, H, Dv] and logsumexps [B, *X, H] (float32, or float64 for float64 storage) by their strides. Rows are
/// counted over [*X, H] along x of the grid, kThreads / kLanes a block, and batch entries along y as far as it goes.
///
/// More than kMaxMergeParts parts. Forward: merge the first ones, then repeat with the result as one of the parts.
/// Backward: merge_sums for every kMaxMergeParts parts, `first` set on the first call, then merge_backward for the same
/// parts with the `sums` that are left.
struct MergeArgs {
  Rows outputs[kMaxMergeParts], logsumexps[kMaxMergeParts];
  Rows grad_outputs[kMaxMergeParts], grad_logsumexps[kMaxMergeParts];  ///< no data where not wanted
  Rows output, logsumexp;                                              ///< logsumexp: no data where not wanted
  Rows grad_output, grad_logsumexp;                                    ///< grad_logsumexp: no data where there is none
  /// merge_parts: all parts are float32 and lie behind outputs[0] and logsumexps[0], this many rows from one to the next.
  long long part_rows = 0;
  void* sums = nullptr;  ///< three numbers a row of the logsumexps' type; null: all parts are here
  bool first = false;
  int parts = 0;
  int batch = 1, heads = 1;
  int len[3] = {1, 1, 1};
};

}  // namespace vicus::gpu

#endif  // VICUS_GPU_MERGE_ARGS_H_
