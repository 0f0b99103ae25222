// Backward of many parts: what all of them add up to, before merge_backward; see merge.cuh.
#include "merge.cuh"

namespace vicus::gpu {

__device__ __forceinline__ void sum_row(const MergeArgs& args, const Row& row, Acc* kept) {
  PartSums sums;
  if (!args.first) sums = {kept[0], kept[1], kept[2]};
  add_parts(args, row, sums);
  sum_over<kLanes>(sums.sum);  // all lanes have read what one of them writes
  if (threadIdx.x % kLanes != 0) return;
  kept[0] = sums.top;
  kept[1] = sums.sum;
  kept[2] = sums.dot;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) merge_sums(const __grid_constant__ MergeArgs args) {
  for_each_row(args, [&](const Row& row, long long i) { sum_row(args, row, static_cast<Acc*>(args.sums) + 3 * i); });
}

}  // namespace vicus::gpu
