// What the kernel of engine sm90 is called with. Plain C++ for the host compiler and NVRTC alike.
#ifndef VICUS_GPU_SM90_ARGS_H_
#define VICUS_GPU_SM90_ARGS_H_

#include "args.h"

namespace vicus::gpu {

/// The driver's CUtensorMap: how the copy engine finds a box of a tensor.
struct alignas(64) TensorMap {
  unsigned long long words[16] = {};
};

struct Sm90Args {
  TensorMap query, key, value, additional_key, additional_value;
  ForwardArgs forward;
  int blocks = 0;  ///< tiles of queries, of all heads and cells
};

}  // namespace vicus::gpu

#endif  // VICUS_GPU_SM90_ARGS_H_
