// What packed_rest.cu is called with. Plain C++ for the host compiler and NVRTC alike.
#ifndef VICUS_GPU_REST_ARGS_H_
#define VICUS_GPU_REST_ARGS_H_

#include "args.h"

namespace vicus::gpu {

/// A tensor [1, tokens, heads, width] whose tokens from `*begin` on become `value`, of which `bytes` (2, 4 or 8) count.
struct Rest {
  Rows rows;
  const int* begin = nullptr;  ///< in device memory: where the last sequence ends
  int tokens = 0, heads = 0, width = 1, bytes = 0;
  unsigned long long value = 0;
};

struct RestArgs {
  static constexpr int kMost = 3;
  Rest rests[kMost];
  int count = 0;
};

}  // namespace vicus::gpu

#endif  // VICUS_GPU_REST_ARGS_H_
