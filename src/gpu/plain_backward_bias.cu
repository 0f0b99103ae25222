// Gradient of the relative positional bias [H, 2 w0 - 1, ...]: one block per entry of the table, over all pairs of queries
// and keys at its distance; eight lanes a pair, sums in float64 in a fixed order, without atomics:
//   dbias[h][d] = sum over batch and queries of p (grad_output . value - delta), key = query + d
//
// Constants of the prologue: those of tiles.cuh, bias.cuh and plain_elements.cuh, kWarps, kHeadDim, kHeadDimV.
#include "bias.cuh"
#include "plain_args.h"
#include "plain_elements.cuh"
#include "tiles.cuh"

namespace vicus::gpu {

constexpr int kThreads = kWarps * 32;
constexpr int kLanes = 8;

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    plain_backward_bias(const __grid_constant__ PlainBackwardArgs plain) {
  __shared__ double scratch[kWarps];
  const ForwardArgs& args = plain.forward;
  long long entry = blockIdx.x, bias_index = 0, grad_index = 0;
  int distance[3] = {0, 0, 0};
  for (int a = 2; a >= kFirstAxis; --a) {
    const int at = static_cast<int>(entry % (2 * kWindow[a] - 1));
    entry /= 2 * kWindow[a] - 1;
    distance[a] = at - (kWindow[a] - 1);
    bias_index += at * args.bias.axis[a];
    grad_index += at * plain.grad_bias.axis[a];
  }
  const int head = static_cast<int>(entry), kv_head = head / (args.heads / args.heads_kv);
  bias_index += head * args.bias.head;
  grad_index += head * plain.grad_bias.head;
  const Acc bias = load_typed<kBiasType>(args.bias.data, bias_index) * kLog2OfE;

  double sum = 0;
  for (int index = 0; index < plain.cells; ++index) {
    const Cell cell = make_cell(args, index);
    Box pairs;  // queries whose partner is a position
    for (int a = 0; a < 3; ++a) {
      const int len = cell.grid.axis[a].queries;
      pairs.axis[a] = {geometry::hi(0, -distance[a]), geometry::lo(len, len - distance[a])};
    }
    if (pairs.empty()) continue;
    const Placed query = place(args.query, cell, 0), key = place(args.key, cell, 0), value = place(args.value, cell, 0);
    const Placed grad = place(plain.grad_output, cell, 0), lse = place(args.logsumexp, cell, 0);
    const Placed delta = place(plain.delta, cell, 0);
    const u32 count = static_cast<u32>(pairs.volume());
    for (u32 i = threadIdx.x / kLanes; i < count; i += kThreads / kLanes) {
      Position q, k;
      u32 rest = i;
      bool seen = true;
      for (int a = 2; a >= 0; --a) {
        q.at[a] = pairs.axis[a].begin + static_cast<int>(rest % static_cast<u32>(pairs.axis[a].size()));
        rest /= static_cast<u32>(pairs.axis[a].size());
        k.at[a] = q.at[a] + distance[a];
        seen = seen && geometry::window(cell.grid.axis[a], q.at[a]).contains(k.at[a]);
      }
      if (!seen) continue;
      const auto at = [](const Rows& t, long long offset) { return static_cast<const Storage*>(t.data) + offset; };
      const Acc dot = dot_rows<kHeadDim, kLanes>(at(args.query, query.row(q, head)), at(args.key, key.row(k, kv_head)));
      const Acc product =
          dot_rows<kHeadDimV, kLanes>(at(plain.grad_output, grad.row(q, head)), at(args.value, value.row(k, kv_head)));
      const Acc natural = static_cast<const Acc*>(args.logsumexp.data)[lse.row(q, head)];
      const Acc logit = dot * static_cast<Acc>(plain.scale_log2) + bias;
      const Acc p = natural == -kInfinity ? 0 : exp2_of(logit - natural * kLog2OfE);
      sum += p * (product - static_cast<const Acc*>(plain.delta.data)[delta.row(q, head)]);
    }
  }
  sum = sum_over_block(threadIdx.x % kLanes == 0 ? sum : 0, scratch);
  if (threadIdx.x == 0) store_typed<kBiasType>(plain.grad_bias.data, grad_index, sum);
}

}  // namespace vicus::gpu
