// Tokens after the last packed sequence belong to none: what the other kernels leave unwritten there becomes outputs of
// 0, logsumexps of -inf, gradients of 0. Any number of blocks; nothing to do, as a rule, when sequences fill the tensors.
#include "rest_args.h"

namespace vicus::gpu {

constexpr int kRestThreads = 256;

template <class Bits>
__device__ __forceinline__ void clear_rest(const Rest& rest) {
  const int begin = *rest.begin < 0 ? 0 : *rest.begin;
  if (begin >= rest.tokens) return;
  const long long count = static_cast<long long>(rest.tokens - begin) * rest.heads * rest.width;
  Bits* data = static_cast<Bits*>(rest.rows.data);
  const long long step = static_cast<long long>(gridDim.x) * kRestThreads;
  for (long long i = static_cast<long long>(blockIdx.x) * kRestThreads + threadIdx.x; i < count; i += step) {
    const long long row = i / rest.width, token = begin + row / rest.heads;
    data[token * rest.rows.token[2] + row % rest.heads * rest.rows.head + i % rest.width] =
        static_cast<Bits>(rest.value);
  }
}

extern "C" __global__ void __launch_bounds__(kRestThreads) packed_rest(const __grid_constant__ RestArgs args) {
  for (int i = 0; i < args.count; ++i) {
    const Rest& rest = args.rests[i];
    if (rest.bytes == 2) clear_rest<unsigned short>(rest);
    else if (rest.bytes == 4) clear_rest<unsigned int>(rest);
    else clear_rest<unsigned long long>(rest);
  }
}

}  // namespace vicus::gpu
