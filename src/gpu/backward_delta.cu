// Statistics of queries for the other backward kernels. Eight lanes per row.
//
// Constants of the prologue: those of tiles.cuh, kHeadDimV, kVectors.
#include "statistics.cuh"

namespace vicus::gpu {

constexpr int kLanes = 8;
constexpr int kDeltaThreads = 256;

extern "C" __global__ void __launch_bounds__(kDeltaThreads) delta(const __grid_constant__ BackwardArgs args) {
  let_next_begin(args.followed);
  const int lane = threadIdx.x % kLanes;
  const RowIndex row = row_index(
      args, static_cast<long long>(blockIdx.x) * (kDeltaThreads / kLanes) + static_cast<int>(threadIdx.x) / kLanes);
  const bool exists = row.batch < args.batch;
  float sum = 0;
  if (exists) {
    const u16* output = static_cast<const u16*>(args.output.data) + row.of(args.output);
    const u16* grad = static_cast<const u16*>(args.grad_output.data) + row.of(args.grad_output);
    sum = dot_rows<kLanes>(output, grad, lane);
  }
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (!exists || lane != 0) return;
  const Statistics of = begin_statistics(args, [&](const Rows& rows) { return row.of(rows); });
  statistics_at(args, row.of(args.statistics)) = {of.lse, of.delta + sum};
}

}  // namespace vicus::gpu
