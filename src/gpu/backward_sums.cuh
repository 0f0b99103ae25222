// dQ, summed on the way by blocks of keys: with atomics, in float32 scratch (kAddQueries).
#pragma once

#include "backward_walk.cuh"

namespace vicus::gpu {

// dS of the warp's keys and the columns from `first`, for the product with keys.
__device__ __forceinline__ void put_grad_scores(Smem& smem, int first, bool any, const Weights<kChunk>& ds) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u16* row =
          smem.grad_scores + (first_row() + 16 * m + 8 * half + lane / 4) * kWeightStride + first + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
        *reinterpret_cast<u32*>(row + 8 * n) = any ? ds.at[n / 2][m][n % 2 * 2 + half] : 0;
      }
    }
  }
}

// Whether the keys that the thread looks at are finite.
__device__ __forceinline__ bool finite_keys(const Smem& smem) {
  float sum = 0;
  for (int i = threadIdx.x; i < kRows * (kDq / 2); i += kThreads) {
    const u32 two = *reinterpret_cast<const u32*>(smem.key + i / (kDq / 2) * kQStride + i % (kDq / 2) * 2);
    sum = fmaf(Half::unpack(static_cast<u16>(two)), 0.0f, fmaf(Half::unpack(static_cast<u16>(two >> 16)), 0.0f, sum));
  }
  return sum == 0;
}

// Whether a query sees key row k.
__device__ __forceinline__ bool sees_key(const Smem& smem, int k, const Position& query) {
  const Position p = own_position(k);
  bool seen = true;
  for (int a = kFirstAxis; a < 3; ++a) seen = seen && smem.windows.seen[a][p.at[a]].contains(query.at[a]);
  return seen;
}

// Adds dS K to the sums of the tile's queries: 16 queries and kWidth features at a time. `careful`: some keys are not
// finite, and unseen pairs are left out.
__device__ __forceinline__ void add_query_sums(const BackwardArgs& args, const Smem& smem, bool careful,
                                               const QueryWalk& walk) {
  constexpr int kWidth = kDq % 64 == 0 ? 64 : kDq % 32 == 0 ? 32 : 16;
  const int lane = threadIdx.x % 32;
  for (int unit = threadIdx.x / 32; unit < kQueryRows / 16 * (kDq / kWidth); unit += kWarps) {
    const int row = unit % (kQueryRows / 16) * 16, feature = unit / (kQueryRows / 16) * kWidth;
    float sums[kWidth / 8][4] = {};
    if (careful) {
#pragma unroll 1
      for (int k = 0; k < kKeys; ++k) {
        const u16* key = smem.key + k * kQStride + feature + 2 * (lane % 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int query = row + 8 * half + lane / 4;
          const float w = Half::unpack(smem.grad_scores[k * kWeightStride + query]);
          if (!sees_key(smem, k, row_position(walk.tile, query))) continue;
          if (kBiasKind == kBiasAdditive && w == 0) continue;  // perhaps hidden by the bias
#pragma unroll
          for (int f = 0; f < kWidth / 8; ++f) {
            sums[f][2 * half] += w * Half::unpack(key[8 * f]);
            sums[f][2 * half + 1] += w * Half::unpack(key[8 * f + 1]);
          }
        }
      }
    } else {
      const u32 a =
          smem_address(smem.grad_scores) + 2 * ((lane % 8 + lane / 16 * 8) * kWeightStride + row + lane / 8 % 2 * 8);
      const u32 b = smem_address(smem.key) + 2 * (lane % 16 * kQStride + feature + lane / 16 * 8);
#pragma unroll 2
      for (int k = 0; k < kRows; k += 16) {
        u32 weights[4];
        ldmatrix_x4_trans(weights, a + 2 * k * kWeightStride);
#pragma unroll
        for (int f = 0; f < kWidth / 8; f += 2) {
          u32 c[4];
          ldmatrix_x4_trans(c, b + 2 * (k * kQStride + 8 * f));
          Half::mma(sums[f], weights, c[0], c[1]);
          Half::mma(sums[f + 1], weights, c[2], c[3]);
        }
      }
    }
    const Placed placed = place(args.query_sums, walk.cell, walk.cell.first_query);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + 8 * half + lane / 4;
      const Position p = row_position(walk.tile, query);
      if (!row_exists(walk.tile, query, p)) continue;
      float* to = static_cast<float*>(args.query_sums.data) + placed.row(p, walk.tile.head + query / kPositions) +
                  feature + 4 * (lane % 4);
#pragma unroll
      for (int f = 0; f < kWidth / 8; f += 2) {
        red_add(to + 8 * f, sums[f][2 * half], sums[f][2 * half + 1], sums[f + 1][2 * half], sums[f + 1][2 * half + 1]);
      }
    }
  }
}

}  // namespace vicus::gpu
