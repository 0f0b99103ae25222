// Merges what parts of the keys give (engine sm90), float32 and one part after the other, into the output and the logsumexp;
// see merge.cuh.
#include "merge.cuh"
#include "overlap.cuh"

namespace vicus::gpu {

static_assert(kVectors && kPiece == 8);

constexpr int kTogether = 8;  // parts whose loads are in flight together

__device__ __forceinline__ void merge_row(const MergeArgs& args, const Row& row) {
  const float* const lse = static_cast<const float*>(args.logsumexps[0].data) + row.offset(args.logsumexps[0]);
  const float* const values = static_cast<const float*>(args.outputs[0].data) + row.offset(args.outputs[0]);
  PartSums sums;
#pragma unroll 8
  for (int i = 0; i < args.parts; ++i) sums.add(lse[i * args.part_rows], 0);
  Storage* out = targets(args.output, row);
  for (int f = threadIdx.x % kLanes * kPiece; f < kHeadDimV; f += kLanes * kPiece) {
    float total[kPiece] = {};
    for (int first = 0; first < args.parts; first += kTogether) {
      float x[kTogether][2][4], logsumexp[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i >= args.parts) continue;
        const long long row_of_part = (first + i) * args.part_rows;
        logsumexp[i] = lse[row_of_part];
        load_values(values + row_of_part * kHeadDimV + f, x[i][0]);
        load_values(values + row_of_part * kHeadDimV + f + 4, x[i][1]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const float weight = first + i < args.parts ? sums.weight(logsumexp[i]) : 0;
        if (weight == 0) continue;
#pragma unroll
        for (int v = 0; v < kPiece; ++v) total[v] += weight * x[i][v / 4][v % 4];
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
  await_kernels_before();
  for_each_row(args, [&](const Row& row, long long) { merge_row(args, row); });
}

}  // namespace vicus::gpu
