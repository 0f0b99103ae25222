// What the backward pass knows of a query: the kernel for delta makes it, or, where warps meet parts of tiles, the kernel for
// queries on its way.
#pragma once

#include "tiles.cuh"

namespace vicus::gpu {

// Logsumexp in powers of two (+inf where nothing is seen, so that weights are zero), and delta = sum_f dO O - dlse.
struct Statistics {
  float lse, delta;
};

// A lane's share of sum_f a[f] b[f]: kLanes of them read a row side by side.
template <int kLanes>
__device__ __forceinline__ float dot_rows(const u16* a, const u16* b, int lane) {
  float sum = 0;
  if constexpr (kVectors) {
    for (int f = 8 * lane; f < kHeadDimV; f += 8 * kLanes) {
      const uint4 x = *reinterpret_cast<const uint4*>(a + f), y = *reinterpret_cast<const uint4*>(b + f);
      const u32 left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
      for (int i = 0; i < 4; ++i) {
        sum += Half::unpack(static_cast<u16>(left[i])) * Half::unpack(static_cast<u16>(right[i]));
        sum += Half::unpack(static_cast<u16>(left[i] >> 16)) * Half::unpack(static_cast<u16>(right[i] >> 16));
      }
    }
  } else {
    for (int f = lane; f < kHeadDimV; f += kLanes) sum += Half::unpack(a[f]) * Half::unpack(b[f]);
  }
  return sum;
}

// Of a query whose row of a tensor is element `row(tensor)`, without sum_f dO O, which is to be added to delta.
template <class RowIn>
__device__ __forceinline__ Statistics begin_statistics(const BackwardArgs& args, const RowIn& row) {
  const float lse = static_cast<const float*>(args.logsumexp.data)[row(args.logsumexp)];
  const float grad = args.grad_logsumexp.data != nullptr
                         ? static_cast<const float*>(args.grad_logsumexp.data)[row(args.grad_logsumexp)]
                         : 0.0f;
  return {lse == -kInfinite ? kInfinite : lse * 1.44269504088896341f, -grad};
}

// Statistics of the row at element `row`.
__device__ __forceinline__ float2& statistics_at(const BackwardArgs& args, long long row) {
  return *reinterpret_cast<float2*>(static_cast<float*>(args.statistics.data) + row);
}

}  // namespace vicus::gpu
