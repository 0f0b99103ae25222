// The products of the backward kernels of sm90: where operands lie, and which accumulators they sum to.
#pragma once

#include "sm90_gradients.cuh"

namespace vicus::gpu {

// Where S, dP and the packed P of a tile would not fit into registers together, P is packed where it lies, and its sums
// start late. Where registers are left, dS stays in them as well as in shared memory; where several blocks share a
// multiprocessor, it goes nowhere else.
constexpr bool kPacksLate = kAdds && kColumns > 64, kKeepsGrads = kCrowd || (kAdds && !kPacksLate);

// Where operands are, in units of 16 bytes: everything from one register.
constexpr int kUnit = 16;
__device__ __forceinline__ constexpr int units(int elements) { return elements * 2 / kUnit; }
constexpr int kRowFirst = 0, kRowSecond = kRowFirst + units(kWarpgroups * kSlabs * kRows * kSlab),
              kFirst = kRowFirst + units(kRowSlabs * kRows * kSlab),
              kSecond = kFirst + units(kStages * kSlabs * kColumns * kSlab),
              kGrads = kSecond + units((kApart ? kSecondStages : kStages) * kValueSlabs * kColumns * kSlab);

// The products of one warpgroup.
struct Products {
  int base, warpgroup;
  float scores[kColumns / 2], grads[kColumns / 2];  // S, later P; dP, later dS
  float first_out[kHeadDim / 2], second_out[kHeadDimV / 2];
  u32 weights[kColumns / 4];
  u32 packed_grads[kColumns / 4];  // kKeepsGrads
  float queries[kSumWidth / 2];    // kAdds: dQ of the tile before

  __device__ __forceinline__ Products(const Smem& smem, int of)
      : base(static_cast<int>((smem_address(&smem) & 0x3ffff) / kUnit)), warpgroup(of) {
#pragma unroll
    for (float& x : first_out) x = 0;
#pragma unroll
    for (float& x : second_out) x = 0;
  }

  // d = rows . columns over kWidth features, in flight
  template <int kWidth>
  __device__ __forceinline__ void start_scores(float (&d)[kColumns / 2], u64 row, u64 column) {
    wgmma_fence();
    wgmma_scores_begin(d, row, column);
#pragma unroll
    for (int f = 16; f < kWidth; f += 16) {
      const int slab = f / kSlab, at = units(f % kSlab);
      wgmma_scores(d, row + (units(slab * kRows * kSlab) + at), column + (units(slab * kColumns * kSlab) + at), 1);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ int first_at(int stage) const {
    return base + kFirst + stage * units(kSlabs * kColumns * kSlab);
  }
  __device__ __forceinline__ int second_at(int stage) const {
    return base + kSecond + stage * units(kValueSlabs * kColumns * kSlab);
  }
  __device__ __forceinline__ void start_first(int stage) {
    const int row = base + kRowFirst + warpgroup * units(kSlabs * kRows * kSlab);
    start_scores<kDq>(scores, operand(0, 16) + row, operand(0, 16) + first_at(stage));
  }
  __device__ __forceinline__ void start_second(int stage) {
    const int row = base + kRowSecond + warpgroup * units(kValueSlabs * kRows * kSlab);
    start_scores<kDv>(grads, operand(0, 16) + row, operand(0, 16) + second_at(stage));
  }

  __device__ __forceinline__ void pack(const float (&d)[kColumns / 2]) { pack(d, weights); }
  __device__ __forceinline__ void pack(const float (&d)[kColumns / 2], u32 (&to)[kColumns / 4]) {
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) to[i] = Half::pack(d[2 * i], d[2 * i + 1]);
  }
  // second_out += P . columns, in flight; P is in `weights`
  __device__ __forceinline__ void start_second_sums(int stage) {
    const u64 columns = operand(0, kColumns * kSlab * 2) + second_at(stage);
    hold(second_out);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kColumns; c += 16) {
      const u32* w = weights + c / 4;
      wgmma_second(second_out, w[0], w[1], w[2], w[3], columns + units(c * kSlab), 1);
    }
    wgmma_commit();
  }
  // first_out += dS . columns; dS is in registers or, beside sums of dV, in shared memory
  __device__ __forceinline__ void start_first_sums(int stage, int buffer) {
    const u64 columns = operand(0, kColumns * kSlab * 2) + first_at(stage);
    hold(first_out);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kColumns; c += 16) {
      if constexpr (kSumsBoth && !kKeepsGrads) {
        const u64 grad = operand(0, 16) + grads_at(buffer, warpgroup, c / kSlab) + units(c % kSlab);
        wgmma_first(first_out, grad, columns + units(c * kSlab), 1);
      } else {
        const u32* w = (kSumsBoth ? packed_grads : weights) + c / 4;
        wgmma_first(first_out, w[0], w[1], w[2], w[3], columns + units(c * kSlab), 1);
      }
    }
    wgmma_commit();
  }
  __device__ __forceinline__ int grads_at(int buffer, int of, int slab) const {
    return base + kGrads + ((buffer * kWarpgroups + of) * kGradSlabs + slab) * units(kRows * kSlab);
  }
  // queries = dS^t . rows of all warpgroups, in flight
  __device__ __forceinline__ void start_query_sums() {
    wgmma_fence();
#pragma unroll
    for (int w = 0; w < kWarpgroups; ++w) {
      const int slab = w * kSlabs + (kHalfQueries ? 0 : warpgroup);
      const u64 grad = operand(0, 16) + grads_at(0, w, kHalfQueries ? warpgroup : 0);
      const u64 keys = operand(0, 16) + (base + kRowFirst + slab * units(kRows * kSlab));
#pragma unroll
      for (int k = 0; k < kRows; k += 16) {
        if (w == 0 && k == 0) wgmma_queries_begin(queries, grad, keys);
        else wgmma_queries(queries, grad + units(k * kSlab), keys + units(k * kSlab), 1);
      }
    }
    wgmma_commit();
  }
};

}  // namespace vicus::gpu
