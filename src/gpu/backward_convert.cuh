// From float32 sums of gradients to gradients. In a row of sums, each group of 16 features goes as four of lane l = 0, 1, 2, 3
// of a matrix product: 2 l, 2 l + 1, 2 l + 8, 2 l + 9. A thread has each four. Constants of the prologue: those of
// careful_gradients.cuh, kVectors.
#pragma once

#include "careful_gradients.cuh"

namespace vicus::gpu {

constexpr int kConvertThreads = 256;

// Four sums to the features of a row of `width`. Not zero once one is not finite.
__device__ __forceinline__ float put_four(const float4& sums, int four, int width, float scale, u16* out) {
  const u32 twos[2] = {Half::pack(sums.x * scale, sums.y * scale), Half::pack(sums.z * scale, sums.w * scale)};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int f = four / 4 * 16 + four % 4 * 2 + 8 * i;
    if constexpr (kVectors) {
      if (f < width) *reinterpret_cast<u32*>(out + f) = twos[i];
    } else {
      if (f < width) out[f] = static_cast<u16>(twos[i]);
      if (f + 1 < width) out[f + 1] = static_cast<u16>(twos[i] >> 16);
    }
  }
  return fmaf(sums.x, 0.0f, fmaf(sums.y, 0.0f, fmaf(sums.z, 0.0f, sums.w * 0.0f)));
}

// The packed sequence of a token, the last that begins there or before; tokens after its end are nobody's.
__device__ __forceinline__ int sequence_of(const int* cumulative, int sequences, int token) {
  int first = 0, past = sequences;
  while (past - first > 1) {
    const int middle = first + (past - first) / 2;
    if (cumulative[middle] <= token) first = middle;
    else past = middle;
  }
  return first;
}

// Rows in which a lane of the warp found `wrong` sums, each once.
template <class Redo>
__device__ __forceinline__ void redo_rows(bool mine, const RowIndex& row, const Redo& redo) {
  u32 wrong = __ballot_sync(~0u, mine);
  __syncwarp();
  while (wrong != 0) {
    const int lane = __ffs(static_cast<int>(wrong)) - 1;
    RowIndex bad = {__shfl_sync(~0u, row.batch, lane), __shfl_sync(~0u, row.head, lane), {0, 0, 0}};
    bool same = row.batch == bad.batch && row.head == bad.head;
    for (int a = kFirstAxis; a < 3; ++a) {
      bad.token[a] = __shfl_sync(~0u, row.token[a], lane);
      same = same && row.token[a] == bad.token[a];
    }
    redo(bad);
    wrong &= ~__ballot_sync(~0u, same);
  }
}

}  // namespace vicus::gpu
