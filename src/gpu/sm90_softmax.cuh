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

/// Boxes of one column of queries meet tiles as wide as its window: rows see whole lines of keys, of eights, or none of them.
/// But for layouts that are shorter than the window.
constexpr bool kWholeLines = !kTopFirst && kRank > 1 && !kDense && !kAdditional && !kCausal[2] && kTileQ[2] == 1 &&
                             kTileKv[2] == kWindow[2] && kTileKv[2] % 8 == 0;

// What the rows of a thread see of a tile: any of the thread's keys; and of its lines those that weights are made of, as
// hidden keys are of no other (kWholeLines).
struct Sight {
  bool some[2] = {true, true};
  u32 lines[2] = {~0u, ~0u};
};

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

  // Makes `beyond`, in powers of two from the base of a row, its base where that is too far or there was none.
  __device__ __forceinline__ void raise(int half, float beyond, float& factor) {
    const bool first = base[half] == kNothing;
    const bool raised = first ? beyond > kNothing : beyond > kSlack;
    factor = !raised ? 1.0f : first ? 0.0f : exp2_approx(-beyond);
    if (raised) base[half] = base_or_zero(half) + beyond;
  }

  // Scores to weights. Sums so far refer to another base afterwards where `factor` is not one.
  __device__ __forceinline__ void step(float (&scores)[kKeys / 2], float scale, const Sight& sight,
                                       float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kTopFirst) {
        raise(half, row_top(scores, half) * scale - base_or_zero(half), factor[half]);
        shift(scores, half, scale, base_or_zero(half), ~0u);
      } else {
        const float before = base_or_zero(half);
        shift(scores, half, scale, before, sight.lines[half]);
        // Positive numbers are in the order of integers, of which three are compared at a time.
        int most = 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          const int first = __float_as_int(scores[4 * n + 2 * half]),
                    other = __float_as_int(scores[4 * n + 2 * half + 1]);
          most = geometry::hi(geometry::hi(most, first), other);
        }
        factor[half] = 1;
        if (__any_sync(~0u, most > __float_as_int(kSlack) || (sight.some[half] && base[half] == kNothing))) {
          raise(half, row_top(scores, half), factor[half]);
          shift(scores, half, 1, base_or_zero(half) - before, ~0u);
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
  // Of lines that are not seen, by infinity.
  __device__ __forceinline__ static void shift(float (&scores)[kKeys / 2], int half, float scale, float by, u32 lines) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const float of_line = !kWholeLines || (lines >> (8 * n / kTileKv[2]) & 1) != 0 ? by : kInfinite;
      scores[4 * n + 2 * half] = scores[4 * n + 2 * half] * scale - of_line;
      scores[4 * n + 2 * half + 1] = scores[4 * n + 2 * half + 1] * scale - of_line;
    }
  }
};

}  // namespace vicus::gpu
