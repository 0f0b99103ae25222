// dQ from its float32 sums, which kernels of keys add up with kAddQueries: backward_keys.cu and sm90_backward.cu. In a row of
// sums, each group of 16 features goes as four of lane l = 0, 1, 2, 3 of a matrix product: 2 l, 2 l + 1, 2 l + 8, 2 l + 9. A
// thread for each four. With kCarefulSums a sum that is not finite may be so for what its query does not see: the warp does
// the row again.
//
// Constants of the prologue: those of careful_gradients.cuh, kVectors, kCarefulSums.
#include "careful_gradients.cuh"

namespace vicus::gpu {

constexpr int kConvertThreads = 256;
constexpr int kWidth = (kHeadDim + 15) / 16 * 16;

// The packed sequence of a token, the last that begins there or before; tokens after its end are nobody's.
__device__ __forceinline__ int sequence_of(const BackwardArgs& args, int token) {
  int first = 0, past = args.sequences;
  while (past - first > 1) {
    const int middle = first + (past - first) / 2;
    if (args.cumulative_queries[middle] <= token) first = middle;
    else past = middle;
  }
  return first;
}

__device__ __forceinline__ void redo(const BackwardArgs& args, const RowIndex& row) {
  const int sequence = kPacked ? sequence_of(args, row.token[2]) : static_cast<int>(row.batch);
  const Cell cell = make_cell(args, CellPlace{sequence, {0, 0, 0}});
  Position query = {{0, 0, 0}};
  for (int a = kFirstAxis; a < 3; ++a) query.at[a] = row.token[a];
  query.at[2] -= cell.first_query;
  if (query.at[2] >= 0 && query.at[2] < cell.grid.axis[2].queries)
    careful_gradients<false>(args, cell, row.head, query);
}

// Three blocks of a multiprocessor: left to itself the compiler stops at 64 registers, and spills.
extern "C" __global__ void __launch_bounds__(kConvertThreads, 3) convert(const __grid_constant__ BackwardArgs args) {
  const long long index = static_cast<long long>(blockIdx.x) * kConvertThreads + threadIdx.x;  // of four sums
  const int four = static_cast<int>(index % (kWidth / 4));
  const RowIndex row = row_index(args, index / (kWidth / 4));
  const bool exists = row.batch < args.batch;
  if (!kCarefulSums && !exists) return;
  float finite = 0;  // NaN once a sum is NaN or infinite
  if (exists) {
    const float4 sums = *reinterpret_cast<const float4*>(static_cast<const float*>(args.query_sums.data) +
                                                         row.of(args.query_sums) + 4 * four);
    finite = fmaf(sums.x, 0.0f, fmaf(sums.y, 0.0f, fmaf(sums.z, 0.0f, sums.w * 0.0f)));
    const float scale = args.scale_log2 * 0.693147180559945309f;
    const u32 twos[2] = {Half::pack(sums.x * scale, sums.y * scale), Half::pack(sums.z * scale, sums.w * scale)};
    u16* out = static_cast<u16*>(args.grad_query.data) + row.of(args.grad_query);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int f = four / 4 * 16 + four % 4 * 2 + 8 * i;
      if constexpr (kVectors) {
        if (f < kHeadDim) *reinterpret_cast<u32*>(out + f) = twos[i];
      } else {
        if (f < kHeadDim) out[f] = static_cast<u16>(twos[i]);
        if (f + 1 < kHeadDim) out[f + 1] = static_cast<u16>(twos[i] >> 16);
      }
    }
  }
  if constexpr (kCarefulSums) {
    u32 wrong = __ballot_sync(~0u, finite != 0);
    __syncwarp();
    while (wrong != 0) {
      const int lane = __ffs(static_cast<int>(wrong)) - 1;
      RowIndex bad = {__shfl_sync(~0u, row.batch, lane), __shfl_sync(~0u, row.head, lane), {0, 0, 0}};
      bool same = row.batch == bad.batch && row.head == bad.head;
      for (int a = kFirstAxis; a < 3; ++a) {
        bad.token[a] = __shfl_sync(~0u, row.token[a], lane);
        same = same && row.token[a] == bad.token[a];
      }
      redo(args, bad);
      wrong &= ~__ballot_sync(~0u, same);
    }
  }
}

}  // namespace vicus::gpu
