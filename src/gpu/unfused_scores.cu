// Scores of queries with the keys they see; see unfused.cuh. Eight lanes of the warp of a query share a key.
#include "unfused.cuh"

namespace vicus::gpu {

__device__ __forceinline__ void score_query(const UnfusedArgs& args, int batch, int head, const Token& at) {
  const int kv_head = head / (args.heads / args.heads_kv);
  const Place q = place_of(args, at);
  const Box window = window_of(q, q.at[0], q.at[1], q.at[2]);
  const Storage* row = values(args.rows, row_of(args.rows, batch, head, at));
  Storage* scores = targets(args.scores, row_of(args.scores, batch, head, at));
  const int group = threadIdx.x % 32 / kDotLanes;
  const bool writer = threadIdx.x % kDotLanes == 0;
  for (long long slot = group; slot < kWindowSlots; slot += 32 / kDotLanes) {
    const int k = static_cast<int>(slot % kWindow[2]), j = static_cast<int>(slot / kWindow[2] % kWindow[1]);
    const int i = static_cast<int>(slot / kWindow[2] / kWindow[1]);
    if (i >= window.axis[0].size() || j >= window.axis[1].size() || k >= window.axis[2].size()) {
      if (writer) scores[slot] = Values::store(args.zero_unused ? 0 : -kInfinity);
      continue;
    }
    const int key[3] = {window.axis[0].begin + i, window.axis[1].begin + j, window.axis[2].begin + k};
    const Token token = q.token(key[0], key[1], key[2]);
    Acc s = dot_rows<kHeadDim, kDotLanes>(row, values(args.keys, row_of(args.keys, batch, kv_head, token)));
    if (!writer) continue;
    if (args.bias.data != nullptr) {
      long long index = head * args.bias.head;
#pragma unroll
      for (int a = kFirstAxis; a < 3; ++a) index += (key[a] - q.at[a] + kWindow[a] - 1) * args.bias.axis[a];
      s += load_typed<kBiasType>(args.bias.data, index);
    }
    scores[slot] = Values::store(s);
  }
  for (int t = group; t < args.tokens; t += 32 / kDotLanes) {
    const Acc s = dot_rows<kHeadDim, kDotLanes>(
        row, values(args.additional, row_of(args.additional, batch, kv_head, {{0, 0, t}})));
    if (writer) scores[kWindowSlots + t] = Values::store(s);
  }
}
extern "C" __global__ void __launch_bounds__(kThreads, 1) unfused_scores(const __grid_constant__ UnfusedArgs args) {
  for_each_row(args, args.heads, [&](int batch, int head, const Token& at) { score_query(args, batch, head, at); });
}

}  // namespace vicus::gpu
