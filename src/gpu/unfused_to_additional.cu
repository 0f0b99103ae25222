// Sums of query rows by the scores of an additional token, which every query sees; see unfused.cuh.
#include "unfused.cuh"

namespace vicus::gpu {

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    unfused_to_additional(const __grid_constant__ UnfusedArgs args) {
  __shared__ Acc scratch[kWarps][kSlice][kPiece][32];
  const int t = static_cast<int>(blockIdx.x) % args.tokens, rest = static_cast<int>(blockIdx.x) / args.tokens;
  const int kv_head = rest % args.heads_kv, batch = rest / args.heads_kv, group = args.heads / args.heads_kv;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int slice = 0; slice * kSlice < kColumns; ++slice) {
    Sums sums;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
#pragma unroll 4
      for (u32 i = warp; i < tokens_of(args); i += kWarps) {
        const Token at = token_at(args, i);
        const Storage weight = *values(args.scores, row_of(args.scores, batch, head, at) + kWindowSlots + t);
        sums.add(values(args.rows, row_of(args.rows, batch, head, at)), Values::load(weight), slice);
      }
    }
#pragma unroll
    for (int i = 0; i < kSlice; ++i) {
      for (int v = 0; v < kPiece; ++v) scratch[warp][i][v][lane] = sums.at[i][v];
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < kSlice; ++i) {
        for (int v = 0; v < kPiece; ++v) {
          Acc total = 0;
          for (int w = 0; w < kWarps; ++w) total += scratch[w][i][v][lane];
          sums.at[i][v] = total;
        }
      }
      store_sums(sums.at, targets(args.additional, row_of(args.additional, batch, kv_head, {{0, 0, t}})), slice);
    }
    __syncthreads();
  }
}

}  // namespace vicus::gpu
