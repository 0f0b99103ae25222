// What a kernel is called with. Plain C++ for the host compiler and NVRTC alike. What a kernel is
// compiled for (head dims, windows, tiles, features) is not here but in constants put before its text; see spec.h.
#ifndef VICUS_GPU_ARGS_H_
#define VICUS_GPU_ARGS_H_

#include "order_args.h"

namespace vicus::gpu {

/// A heads-last tensor [B, *X, H, D] or a logsumexp [B, *X, H]; strides in elements, token axes trailing in three.
struct Rows {
  void* data = nullptr;
  long long batch = 0, head = 0;
  long long token[3] = {};
};

/// Relative positional bias [H, 2 w0 - 1, ...] or an additive mask [B, H, Sq, Sk] (batch and head 0 where broadcast).
struct Bias {
  void* data = nullptr;
  long long batch = 0, head = 0;
  long long axis[3] = {};
};

/// What blocks are of: tiles of queries or of keys, along the heads, in cells (sequence x residue class).
struct Work {
  int tiles[3] = {1, 1, 1};    ///< of the largest cell
  int head_blocks = 1;         ///< query tiles along the heads
  int classes[3] = {1, 1, 1};  ///< residue classes per axis
};

struct ForwardArgs {
  Rows query, key, value, additional_keys, additional_values, output, logsumexp;
  Bias bias;
  Work work;
  TileOrder order;         ///< of `work`
  int len[3] = {1, 1, 1};  ///< tokens of the layout; dense: queries
  int keys = 0;            ///< dense
  int heads = 1, heads_kv = 1;
  int additional = 0;
  float scale_log2 = 1;  ///< scale * log2(e)
  const int* cumulative_queries = nullptr;
  const int* cumulative_keys = nullptr;
  const int* key_lengths = nullptr;
};

/// Of all backward kernels. `work` counts tiles of what a kernel has a block for: queries, keys, or additional tokens
/// (whose cells are then batch entries).
struct BackwardArgs : ForwardArgs {
  Rows grad_output, grad_logsumexp;       ///< the second may be absent
  Rows grad_query, grad_key, grad_value;  ///< an absent one is not stored
  Rows grad_additional_keys, grad_additional_values;
  Bias grad_bias;                ///< of the relative bias, in its type
  Rows statistics;               ///< float32 scratch [B, *X, H, 2]: statistics.cuh
  Rows query_sums;               ///< float32 scratch [B, *X, H, D16], of boxes [B, H, *X, D16]: backward_convert.cu
  Rows key_sums, value_sums;     ///< float32 scratch [parts, B, *X, Hkv, D16]: backward_convert_keys.cu
  int key_parts = 1;             ///< blocks that share out the query heads of a tile of keys
  long long key_rows = 0;        ///< B * X * Hkv
  int batch = 1, sequences = 1;  ///< packed: one batch entry, several sequences
  bool followed = false;         ///< by a kernel of the same call that waits for this one: overlap.cuh
};

}  // namespace vicus::gpu

#endif  // VICUS_GPU_ARGS_H_
