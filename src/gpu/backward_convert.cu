// dQ from its float32 sums, which kernels of keys add up with kAddQueries: backward_keys.cu and sm90_backward.cu. With
// kCarefulSums a sum that is not finite may be so for what its query does not see: the warp does the row again.
#include "backward_convert.cuh"

namespace vicus::gpu {

constexpr int kWidth = (kHeadDim + 15) / 16 * 16;

__device__ __forceinline__ void redo(const BackwardArgs& args, const RowIndex& row) {
  const int sequence =
      kPacked ? sequence_of(args.cumulative_queries, args.sequences, row.token[2]) : static_cast<int>(row.batch);
  const Cell cell = make_cell(args, CellPlace{sequence, {0, 0, 0}});
  Position query = {{0, 0, 0}};
  for (int a = kFirstAxis; a < 3; ++a) query.at[a] = row.token[a];
  query.at[2] -= cell.first_query;
  if (query.at[2] >= 0 && query.at[2] < cell.grid.axis[2].queries)
    careful_gradients<false>(args, cell, row.head, query);
}

// Three blocks of a multiprocessor: left to itself the compiler stops at 64 registers, and spills.
extern "C" __global__ void __launch_bounds__(kConvertThreads, 3) convert(const __grid_constant__ BackwardArgs args) {
  begin_after_others(args.followed);
  const long long index = static_cast<long long>(blockIdx.x) * kConvertThreads + threadIdx.x;  // of four sums
  const int four = static_cast<int>(index % (kWidth / 4));
  const RowIndex row = row_index(args, index / (kWidth / 4));
  const bool exists = row.batch < args.batch;
  if (!kCarefulSums && !exists) return;
  float finite = 0;
  if (exists) {
    const float4 sums = *reinterpret_cast<const float4*>(static_cast<const float*>(args.query_sums.data) +
                                                         row.of(args.query_sums) + 4 * four);
    finite = put_four(sums, four, kHeadDim, args.scale_log2 * 0.693147180559945309f,
                      static_cast<u16*>(args.grad_query.data) + row.of(args.grad_query));
  }
  if constexpr (kCarefulSums) {
    redo_rows(finite != 0, row, [&](const RowIndex& bad) { redo(args, bad); });
  }
}

}  // namespace vicus::gpu
