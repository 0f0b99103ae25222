// The merged output and logsumexp; see merge.cuh.
#include "merge.cuh"

namespace vicus::gpu {

__device__ __forceinline__ void merge_row(const MergeArgs& args, const Row& row) {
  PartSums sums;
  for (int i = 0; i < args.parts; ++i) sums.add(number(args.logsumexps[i], row), 0);
  Storage* out = targets(args.output, row);
  for (int f = threadIdx.x % kLanes * kPiece; f < kHeadDimV; f += kLanes * kPiece) {
    Acc total[kPiece] = {};
#pragma unroll 4
    for (int i = 0; i < args.parts; ++i) {
      const Acc weight = sums.weight(number(args.logsumexps[i], row));
      if (weight == 0) continue;
      Acc x[kPiece];
      load_values(values(args.outputs[i], row) + f, x);
#pragma unroll
      for (int v = 0; v < kPiece; ++v) total[v] += weight * x[v];
    }
    store_values(out + f, total);
  }
  if (args.logsumexp.data != nullptr && threadIdx.x % kLanes == 0) {
    static_cast<Acc*>(args.logsumexp.data)[row.offset(args.logsumexp)] =
        sums.top == -kInfinity ? -kInfinity : sums.top + log2_of(sums.sum) * kLn2;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) merge_forward(const __grid_constant__ MergeArgs args) {
  for_each_row(args, [&](const Row& row, long long) { merge_row(args, row); });
}

}  // namespace vicus::gpu
