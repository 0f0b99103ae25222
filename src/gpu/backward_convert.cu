// dQ from its float32 sums, which backward_keys.cu adds up with kAddQueries. In a row of sums, each group of 16
// features goes as four of lane l = 0, 1, 2, 3 of a matrix product: 2 l, 2 l + 1, 2 l + 8, 2 l + 9. A thread per pair
// of features.
//
// Constants of the prologue: those of tiles.cuh, kHeadDim.
#include "tiles.cuh"

namespace vicus::gpu {

constexpr int kConvertThreads = 256;
constexpr int kWidth = (kHeadDim + 15) / 16 * 16;

extern "C" __global__ void __launch_bounds__(kConvertThreads) convert(const __grid_constant__ BackwardArgs args) {
  const long long index = static_cast<long long>(blockIdx.x) * kConvertThreads + threadIdx.x;  // of a pair of features
  const int f = static_cast<int>(index % (kWidth / 2)) * 2;
  long long rest = index / (kWidth / 2);
  const int head = static_cast<int>(rest % args.heads);
  rest /= args.heads;
  long long from = head * args.query_sums.head, to = head * args.grad_query.head;
  for (int a = 2; a >= 0; --a) {
    from += rest % args.len[a] * args.query_sums.token[a];
    to += rest % args.len[a] * args.grad_query.token[a];
    rest /= args.len[a];
  }
  if (rest >= args.batch) return;
  const float* sums = static_cast<const float*>(args.query_sums.data) + from + rest * args.query_sums.batch +
                      f / 16 * 16 + f % 8 / 2 * 4 + f % 16 / 8 * 2;
  const float scale = args.scale_log2 * 0.693147180559945309f;
  const u32 two = Half::pack(sums[0] * scale, sums[1] * scale);
  u16* out = static_cast<u16*>(args.grad_query.data) + to + rest * args.grad_query.batch + f;
  if (f < kHeadDim) out[0] = static_cast<u16>(two);
  if (f + 1 < kHeadDim) out[1] = static_cast<u16>(two >> 16);
}

}  // namespace vicus::gpu
