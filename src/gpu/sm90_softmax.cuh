// The softmax of a warpgroup's rows; sm90_mask.cuh says which a thread has.
#pragma once

#include "sm90_mask.cuh"

namespace vicus::gpu {

constexpr float kNothing = -kInfinite;
/// The maximum that weights refer to may be exceeded by this power of two before sums are scaled to another: weights
/// stay far below what 16 bits hold.
constexpr float kSlack = 8;

/// Whether maxima come before weights. Else weights refer to those of tiles before, until one is too far beyond: fewer
/// comparisons, for a branch. Blocks of a crowd have few tiles; three warpgroups wait for each other's exponentials anyway.
constexpr bool kTopFirst = kCrowd || kWarpgroups == 3;

struct Softmax {
  // Of each row: what is subtracted from its scores, in powers of two, and the sum of its weights.
  float base[2] = {kNothing, kNothing}, sum[2] = {0, 0};

  // The maximum of a row, of which each of four lanes has some.
  __device__ __forceinline__ static float row_top(const float (&scores)[kKeys / 2], int half) {
    float top[2] = {scores[2 * half], scores[2 * half + 1]};
#pragma unroll
    for (int n = 1; n < kKeys / 8; ++n) {
      top[0] = fmaxf(top[0], scores[4 * n + 2 * half]);
      top[1] = fmaxf(top[1], scores[4 * n + 2 * half + 1]);
    }
    top[0] = fmaxf(top[0], top[1]);
    top[0] = fmaxf(top[0], __shfl_xor_sync(~0u, top[0], 1));
    return fmaxf(top[0], __shfl_xor_sync(~0u, top[0], 2));
  }

  [[nodiscard]] __device__ __forceinline__ float base_or_zero(int half) const {
    return base[half] == kNothing ? 0.0f : base[half];
  }

  // Makes `top` the base of a row, in powers of two beyond the present one, where it is too far beyond or there was none.
  __device__ __forceinline__ void raise(int half, float beyond, float& factor) {
    const bool first = base[half] == kNothing;
    const bool raised = first ? beyond > kNothing : beyond > kSlack;
    factor = !raised ? 1.0f : first ? 0.0f : exp2_approx(-beyond);
    if (raised) base[half] = base_or_zero(half) + beyond;
  }

  // Scores to weights. Sums so far refer to another base afterwards where `factor` is not one. `sees`: whether the thread
  // has a key that its rows see.
  __device__ __forceinline__ void step(float (&scores)[kKeys / 2], float scale, const bool (&sees)[2],
                                       float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kTopFirst) {
        raise(half, row_top(scores, half) * scale - base_or_zero(half), factor[half]);
        shift(scores, half, scale, base_or_zero(half));
      } else {
        const float before = base_or_zero(half);
        shift(scores, half, scale, before);
        // Positive numbers are in the order of integers, of which three are compared at a time.
        int most = 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          const int first = __float_as_int(scores[4 * n + 2 * half]),
                    other = __float_as_int(scores[4 * n + 2 * half + 1]);
          most = geometry::hi(geometry::hi(most, first), other);
        }
        factor[half] = 1;
        if (__any_sync(~0u, most > __float_as_int(kSlack) || (sees[half] && base[half] == kNothing))) {
          raise(half, row_top(scores, half), factor[half]);
          shift(scores, half, 1, base_or_zero(half) - before);
        }
      }
      float total[2] = {0, 0};
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = scores[4 * n + 2 * half + i];
          s = exp2_approx(s);
          total[i] += s;
        }
      }
      sum[half] = sum[half] * factor[half] + (total[0] + total[1]);
    }
  }

 private:
  __device__ __forceinline__ static void shift(float (&scores)[kKeys / 2], int half, float scale, float by) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      scores[4 * n + 2 * half] = scores[4 * n + 2 * half] * scale - by;
      scores[4 * n + 2 * half + 1] = scores[4 * n + 2 * half + 1] * scale - by;
    }
  }
};

}  // namespace vicus::gpu
