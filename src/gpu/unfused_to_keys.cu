// Sums of query rows by the scores that a key has with them; see unfused.cuh.
#include "unfused.cuh"

namespace vicus::gpu {

__device__ __forceinline__ void sum_to_key(const UnfusedArgs& args, int batch, int kv_head, const Token& at) {
  const int group = args.heads / args.heads_kv;
  const Place k = place_of(args, at);
  Box queries;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    queries.axis[a] = a < kFirstAxis ? Span{0, 1} : geometry::queries_of(k.grid.axis[a], {k.at[a], k.at[a] + 1});
  }
  Storage* out = targets(args.keys, row_of(args.keys, batch, kv_head, at));
  for (int slice = 0; slice * kSlice < kColumns; ++slice) {
    Sums sums;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int i = queries.axis[0].begin; i < queries.axis[0].end; ++i) {
        const long long plane = k.at[0] - geometry::window(k.grid.axis[0], i).begin;
        for (int j = queries.axis[1].begin; j < queries.axis[1].end; ++j) {
          const long long line = plane * kWindow[1] + k.at[1] - geometry::window(k.grid.axis[1], j).begin;
#pragma unroll 4
          for (int n = queries.axis[2].begin; n < queries.axis[2].end; ++n) {
            const long long slot = line * kWindow[2] + k.at[2] - geometry::window(k.grid.axis[2], n).begin;
            const Token token = k.token(i, j, n);
            sums.add(values(args.rows, row_of(args.rows, batch, head, token)),
                     Values::load(*values(args.scores, row_of(args.scores, batch, head, token) + slot)), slice);
          }
        }
      }
    }
    store_sums(sums.at, out, slice);
  }
}
extern "C" __global__ void __launch_bounds__(kThreads, 1) unfused_to_keys(const __grid_constant__ UnfusedArgs args) {
  for_each_row(args, args.heads_kv, [&](int batch, int head, const Token& at) { sum_to_key(args, batch, head, at); });
}

}  // namespace vicus::gpu
