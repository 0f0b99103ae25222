// dQ, summed on the way by blocks of keys (kAdds): each tile of queries adds what it gets from a block to float32 scratch,
// in no fixed order.
//
// Warpgroups multiply dS of all keys of the block by those keys, write that to shared memory, and one thread of the
// loading warps has the copy engine add it: no atomics of the math, whose warps go on at once. Barriers: grads_full (dS of
// all warpgroups is there), grads_empty (it has been multiplied), sums_full, sums_empty (the copy engine has read them).
#pragma once

#include "sm90_gradients.cuh"

namespace vicus::gpu {

__device__ __forceinline__ void init_query_sums(Smem& smem) {
  mbarrier_init(smem_address(&smem.grads_full), kMathThreads);
  mbarrier_init(smem_address(&smem.grads_empty), kWarpgroups * 4);
  mbarrier_init(smem_address(&smem.sums_full), kWarpgroups * 4);
  mbarrier_init(smem_address(&smem.sums_empty), 1);
  fence_mbarrier_init();
}

// Sums of a warpgroup to shared memory: kSumSlab features of all queries after each other, without conflicts of banks. In a
// row, 16 features lie as backward_convert.cu says.
__device__ __forceinline__ void put_query_sums(Smem& smem, const float (&sums)[kSumWidth / 2], int warpgroup) {
  const int lane = threadIdx.x % 32,
            row = threadIdx.x / 32 % 4 * 16 + lane / 4 + (kHalfQueries ? warpgroup * kRows : 0);
  float* const to = smem.sums[kHalfQueries ? 0 : warpgroup * kSumWidth / kSumSlab] + row * kSumSlab + lane % 4 * 4;
#pragma unroll
  for (int slab = 0; slab < kSumWidth / kSumSlab; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 8 * slab + 2 * half;
      *reinterpret_cast<float4*>(to + (slab * kColumns + 8 * half) * kSumSlab) =
          float4{sums[i], sums[i + 1], sums[i + 4], sums[i + 5]};
    }
  }
  fence_proxy_async();
}

// The one thread that has the sums of each tile added. The math begins with sums of no tile.
__device__ __forceinline__ void add_query_sums(const Sm90BackwardArgs& args, Smem& smem) {
  const Cell& cell = smem.rows.cell;
  ColumnWalk at;
  at.begin(smem);
  u32 phase = 0;
  for (int t = smem.tiles > 0 ? -1 : 0; t < smem.tiles; ++t) {
    mbarrier_wait(smem_address(&smem.sums_full), phase);
    phase ^= 1;
    if (t >= 0) {
      const Position token = token_of(cell, at.walk.origin, cell.first_query);
#pragma unroll 1
      for (int f = 0; f < kDq; f += kSumSlab) {
        const int c[5] = {f, token.at[2], token.at[1], token.at[0], cell.batch * args.backward.heads + at.head};
        tma_add(args.query_sums, smem_address(smem.sums[f / kSumSlab]), c);
      }
      bulk_commit();
      at.next(smem);
      bulk_wait_read();
    }
    mbarrier_arrive(smem_address(&smem.sums_empty));
  }
}

}  // namespace vicus::gpu
