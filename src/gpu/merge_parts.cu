// Merges what parts of the keys give (engine sm90), float32 and one part after the other, into the output and the logsumexp;
// see merge.cuh.
#include "merge.cuh"

namespace vicus::gpu {

static_assert(kVectors && kPiece == 8);

__device__ __forceinline__ void merge_row(const MergeArgs& args, const Row& row) {
  const float* const lse = static_cast<const float*>(args.logsumexps[0].data) + row.offset(args.logsumexps[0]);
  const float* const values = static_cast<const float*>(args.outputs[0].data) + row.offset(args.outputs[0]);
  PartSums sums;
#pragma unroll 4
  for (int i = 0; i < args.parts; ++i) sums.add(lse[i * args.part_rows], 0);
  Storage* out = targets(args.output, row);
  for (int f = threadIdx.x % kLanes * kPiece; f < kHeadDimV; f += kLanes * kPiece) {
    float total[kPiece] = {};
#pragma unroll 4
    for (int i = 0; i < args.parts; ++i) {
      const float weight = sums.weight(lse[i * args.part_rows]);
      if (weight == 0) continue;
      const float* const part = values + i * args.part_rows * kHeadDimV + f;
#pragma unroll
      for (int half = 0; half < kPiece; half += 4) {
        float x[4];
        load_values(part + half, x);
#pragma unroll
        for (int v = 0; v < 4; ++v) total[half + v] += weight * x[v];
      }
    }
    store_values(out + f, total);
  }
  if (args.logsumexp.data != nullptr && threadIdx.x % kLanes == 0) {
    static_cast<float*>(args.logsumexp.data)[row.offset(args.logsumexp)] =
        sums.top == -kInfinity ? -kInfinity : sums.top + log2_of(sums.sum) * kLn2;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) merge_parts(const __grid_constant__ MergeArgs args) {
  for_each_row(args, [&](const Row& row, long long) { merge_row(args, row); });
}

}  // namespace vicus::gpu
