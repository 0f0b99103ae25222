// From the registers of a warpgroup product to rows in memory.
#pragma once

#include "sm90.cuh"

namespace vicus::gpu {

// Sums of two rows of a thread, `half` the lower or upper: four lanes exchange columns until each has 8 in a row.
template <int kWidth>
__device__ __forceinline__ bool store_row(const float (&out)[kWidth / 2], int half, float factor, bool exists,
                                          u16* row) {
  const int part = threadIdx.x % 4;
  float finite = 0;  // NaN once a value is NaN or infinite
#pragma unroll
  for (int first = 0; first < kWidth / 8; first += 4) {
    u32 x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = first + j < kWidth / 8 ? first + j : first;
      const float a = out[4 * n + 2 * half] * factor, b = out[4 * n + 2 * half + 1] * factor;
      finite = fmaf(b, 0.0f, fmaf(a, 0.0f, finite));
      x[j] = Half::pack(a, b);
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const bool upper = (part & step) != 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((j & step) != 0) continue;
        const u32 got = __shfl_xor_sync(~0u, upper ? x[j] : x[j + step], step);
        if (upper) x[j] = got;
        else x[j + step] = got;
      }
    }
    store_four(row + 8 * (first + part), x, exists && first + part < kWidth / 8);
  }
  return finite != 0.0f && exists;
}

}  // namespace vicus::gpu
