// The softmax of a warpgroup's rows; sm90_mask.cuh says which a thread has.
#pragma once

#include "sm90_mask.cuh"

namespace vicus::gpu {

constexpr float kNothing = -kInfinite;
/// The maximum that weights refer to may be exceeded by this power of two before sums are scaled to another: weights
/// stay far below what 16 bits hold.
constexpr float kSlack = 8;

struct Softmax {
  float top[2] = {kNothing, kNothing}, sum[2] = {0, 0};

  // Scores to weights. Sums so far refer to another maximum afterwards where `factor` is not one.
  __device__ __forceinline__ void step(float (&scores)[kKeys / 2], float scale, float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most[2] = {scores[2 * half], scores[2 * half + 1]};
#pragma unroll
      for (int n = 1; n < kKeys / 8; ++n) {
        most[0] = fmaxf(most[0], scores[4 * n + 2 * half]);
        most[1] = fmaxf(most[1], scores[4 * n + 2 * half + 1]);
      }
      most[0] = fmaxf(most[0], most[1]);
      most[0] = fmaxf(most[0], __shfl_xor_sync(~0u, most[0], 1));
      most[0] = fmaxf(most[0], __shfl_xor_sync(~0u, most[0], 2));
      const bool raise = (most[0] - top[half]) * scale > kSlack;
      factor[half] = raise ? exp2_approx((top[half] - most[0]) * scale) : 1.0f;
      if (raise) top[half] = most[0];
      const float base = top[half] == kNothing ? 0.0f : top[half] * scale;
      float total[2] = {0, 0};
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = scores[4 * n + 2 * half + i];
          s = exp2_approx(s * scale - base);
          total[i] += s;
        }
      }
      sum[half] = sum[half] * factor[half] + (total[0] + total[1]);
    }
  }
};

}  // namespace vicus::gpu
