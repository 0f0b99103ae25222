// The products of the forward kernel of sm90: where operands lie, and which accumulators they sum to.
#pragma once

#include "sm90_tiles.cuh"

namespace vicus::gpu {

// The products of one warpgroup.
struct Products {
  u64 query, keys, values;
  float scores[kKeys / 2], out[kHeadDimV / 2];
  u32 weights[kKeys / 4];  // of the key tile before, as the second product takes them

  __device__ __forceinline__ Products(const Smem& smem, int warpgroup)
      : query(operand(smem_address(smem.query[warpgroup][0]), 16)),
        keys(operand(smem_address(smem.key[0][0]), 16)),
        values(operand(smem_address(smem.value[0][0]), kKeys * kSlab * 2)) {}

  // scores = query . key, in flight
  __device__ __forceinline__ void start_scores(int stage) {
    const u64 key = keys + stage * (kSlabs * kKeys * kSlab * 2 / 16);
    hold(scores);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDq; d += 16) {
      const int at = d % kSlab * 2 / 16, slab = d / kSlab;
      wgmma_scores(scores, query + (slab * kRows * kSlab * 2 / 16 + at), key + (slab * kKeys * kSlab * 2 / 16 + at),
                   d > 0);
    }
  }
  // out += weights . value, in flight
  __device__ __forceinline__ void start_sums(int stage) {
    const u64 value = values + stage * (kValueSlabs * kKeys * kSlab * 2 / 16);
    hold(out);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys; k += 16) {
      wgmma_values(out, weights[k / 4], weights[k / 4 + 1], weights[k / 4 + 2], weights[k / 4 + 3],
                   value + k * kSlab * 2 / 16, 1);
    }
  }
  __device__ __forceinline__ void scale_sums(const float (&factor)[2]) {
#pragma unroll
    for (int f = 0; f < kHeadDimV / 2; f += 4) {
      out[f] *= factor[0];
      out[f + 1] *= factor[0];
      out[f + 2] *= factor[1];
      out[f + 3] *= factor[1];
    }
  }
  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i] = Half::pack(scores[2 * i], scores[2 * i + 1]);
  }
};

}  // namespace vicus::gpu
