// dQ from its float32 sums, which backward_keys.cu adds up with kAddQueries. In a row of sums, each group of 16
// features goes as four of lane l = 0, 1, 2, 3 of a matrix product: 2 l, 2 l + 1, 2 l + 8, 2 l + 9. A thread for each
// four.
//
// Constants of the prologue: those of tiles.cuh, kHeadDim, kVectors.
#include "tiles.cuh"

namespace vicus::gpu {

constexpr int kConvertThreads = 256;
constexpr int kWidth = (kHeadDim + 15) / 16 * 16;

extern "C" __global__ void __launch_bounds__(kConvertThreads) convert(const __grid_constant__ BackwardArgs args) {
  const long long index = static_cast<long long>(blockIdx.x) * kConvertThreads + threadIdx.x;  // of four sums
  const int four = static_cast<int>(index % (kWidth / 4));
  const RowIndex row = row_index(args, index / (kWidth / 4));
  if (row.batch >= args.batch) return;
  const float4 sums = *reinterpret_cast<const float4*>(static_cast<const float*>(args.query_sums.data) +
                                                       row.of(args.query_sums) + 4 * four);
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

}  // namespace vicus::gpu
