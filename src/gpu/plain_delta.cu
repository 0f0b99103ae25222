// delta = output . grad_output - grad_logsumexp of every query, for the backward kernels; eight lanes a row. Rows of a
// batch entry [*X, H] along x of the grid, batch entries along y as far as it goes.
//
// Constants of the prologue: those of plain_elements.cuh, kWarps, kHeadDimV.
#include "plain_args.h"
#include "plain_elements.cuh"

namespace vicus::gpu {

constexpr int kThreads = kWarps * 32;
constexpr int kLanes = 8;

extern "C" __global__ void __launch_bounds__(kThreads) plain_delta(const __grid_constant__ PlainBackwardArgs plain) {
  const ForwardArgs& args = plain.forward;
  const u32 rows = static_cast<u32>(args.len[0]) * args.len[1] * args.len[2] * args.heads;
  const u32 row = blockIdx.x * static_cast<u32>(kThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= rows) return;
  const int head = static_cast<int>(row % args.heads);
  u32 rest = row / args.heads;
  int at[3];
#pragma unroll
  for (int a = 2; a >= 0; --a) {
    at[a] = static_cast<int>(rest % args.len[a]);
    rest /= args.len[a];
  }
  for (int batch = blockIdx.y; batch < plain.batch; batch += gridDim.y) {
    const auto offset = [&](const Rows& t) {
      return batch * t.batch + at[0] * t.token[0] + at[1] * t.token[1] + at[2] * t.token[2] + head * t.head;
    };
    Acc delta =
        dot_rows<kHeadDimV, kLanes>(static_cast<const Storage*>(args.output.data) + offset(args.output),
                                    static_cast<const Storage*>(plain.grad_output.data) + offset(plain.grad_output));
    if (threadIdx.x % kLanes != 0) continue;
    if (plain.grad_logsumexp.data != nullptr) {
      delta -= static_cast<const Acc*>(plain.grad_logsumexp.data)[offset(plain.grad_logsumexp)];
    }
    static_cast<Acc*>(plain.delta.data)[offset(plain.delta)] = delta;
  }
}

}  // namespace vicus::gpu
