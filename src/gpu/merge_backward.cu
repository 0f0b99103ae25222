// Gradients of the parts; see merge.cuh.
#include "merge.cuh"

namespace vicus::gpu {

__device__ __forceinline__ void split_row(const MergeArgs& args, const Row& row, long long index) {
  PartSums sums;
  if (args.sums != nullptr) {
    const Acc* const kept = static_cast<const Acc*>(args.sums) + 3 * index;
    sums = {kept[0], kept[1], kept[2]};
  } else {
    add_parts(args, row, sums);
  }
  const Acc whole = sums.dot / sums.sum;  // grad_output . output
  const Acc grad_lse = args.grad_logsumexp.data != nullptr ? number(args.grad_logsumexp, row) : 0;
  for (int i = 0; i < args.parts; ++i) {
    const Acc weight = sums.weight(number(args.logsumexps[i], row));
    if (args.grad_logsumexps[i].data != nullptr) {
      const Acc grad = weight == 0 ? 0 : weight * (grad_dot_output(args, row, i) - whole + grad_lse);
      if (threadIdx.x % kLanes == 0) {
        static_cast<Acc*>(args.grad_logsumexps[i].data)[row.offset(args.grad_logsumexps[i])] = grad;
      }
    }
    if (args.grad_outputs[i].data == nullptr) continue;
    Storage* out = targets(args.grad_outputs[i], row);
    for (int f = threadIdx.x % kLanes * kPiece; f < kHeadDimV; f += kLanes * kPiece) {
      Acc x[kPiece];
      load_values(values(args.grad_output, row) + f, x);
#pragma unroll
      for (int v = 0; v < kPiece; ++v) x[v] = weight == 0 ? 0 : weight * x[v];
      store_values(out + f, x);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) merge_backward(const __grid_constant__ MergeArgs args) {
  for_each_row(args, [&](const Row& row, long long index) { split_row(args, row, index); });
}

}  // namespace vicus::gpu
