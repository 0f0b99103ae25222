// Sums of key rows by the scores of a query; see unfused.cuh.
#include "unfused.cuh"

namespace vicus::gpu {

__device__ __forceinline__ void sum_to_query(const UnfusedArgs& args, int batch, int head, const Token& at) {
  const int kv_head = head / (args.heads / args.heads_kv);
  const Place q = place_of(args, at);
  const Box window = window_of(q, q.at[0], q.at[1], q.at[2]);
  const Storage* scores = values(args.scores, row_of(args.scores, batch, head, at));
  Storage* out = targets(args.rows, row_of(args.rows, batch, head, at));
  for (int slice = 0; slice * kSlice < kColumns; ++slice) {
    Sums sums;
    for (int i = window.axis[0].begin; i < window.axis[0].end; ++i) {
      for (int j = window.axis[1].begin; j < window.axis[1].end; ++j) {
        const long long line =
            (static_cast<long long>(i - window.axis[0].begin) * kWindow[1] + j - window.axis[1].begin) * kWindow[2] -
            window.axis[2].begin;
#pragma unroll 4
        for (int k = window.axis[2].begin; k < window.axis[2].end; ++k) {
          sums.add(values(args.keys, row_of(args.keys, batch, kv_head, q.token(i, j, k))),
                   Values::load(scores[line + k]), slice);
        }
      }
    }
    for (int t = 0; t < args.tokens; ++t) {
      sums.add(values(args.additional, row_of(args.additional, batch, kv_head, {{0, 0, t}})),
               Values::load(scores[kWindowSlots + t]), slice);
    }
    store_sums(sums.at, out, slice);
  }
}
extern "C" __global__ void __launch_bounds__(kThreads, 1) unfused_to_queries(const __grid_constant__ UnfusedArgs args) {
  for_each_row(args, args.heads, [&](int batch, int head, const Token& at) { sum_to_query(args, batch, head, at); });
}

}  // namespace vicus::gpu
