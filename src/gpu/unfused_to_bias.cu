// Gradient of the relative positional bias: sums of scores at one distance, in float64; see unfused.cuh.
#include "unfused.cuh"

namespace vicus::gpu {

extern "C" __global__ void __launch_bounds__(kThreads, 1) unfused_to_bias(const __grid_constant__ UnfusedArgs args) {
  __shared__ double scratch[kWarps];
  long long entry = blockIdx.x, out = 0;
  int distance[3] = {0, 0, 0};
#pragma unroll
  for (int a = 2; a >= kFirstAxis; --a) {
    const int at = static_cast<int>(entry % (2 * kWindow[a] - 1));
    entry /= 2 * kWindow[a] - 1;
    distance[a] = at - (kWindow[a] - 1);
    out += at * args.bias.axis[a];
  }
  const int head = static_cast<int>(entry);
  double sum = 0;
  for (int batch = 0; batch < args.batch; ++batch) {
    for (u32 i = threadIdx.x; i < tokens_of(args); i += kThreads) {
      const Token at = token_at(args, i);
      const Place q = place_of(args, at);
      long long slot = 0;
      bool seen = true;
#pragma unroll
      for (int a = 0; a < 3; ++a) {
        const Span window = geometry::window(q.grid.axis[a], q.at[a]);
        const int key = q.at[a] + distance[a];
        seen = seen && window.contains(key);
        slot = slot * kWindow[a] + key - window.begin;
      }
      if (seen) sum += Values::load(*values(args.scores, row_of(args.scores, batch, head, at) + slot));
    }
  }
  sum = sum_over_block(sum, scratch);
  if (threadIdx.x == 0) store_typed<kBiasType>(args.bias.data, out + head * args.bias.head, sum);
}

}  // namespace vicus::gpu
