// Gradient of the relative bias: one block per entry of the table and head, over all pairs of a query and the key at
// the entry's offset from it, each by one thread, summed in an order that never changes. Slow: rows are read again for
// every entry.
//
// Constants of the prologue: those of tiles.cuh and bias.cuh, kHeadDim, kHeadDimV, kVectors.
#include "bias.cuh"

namespace vicus::gpu {

constexpr int kBiasThreads = 256;
static_assert(kBiasKind == kBiasRelative);

template <int kWidth>
__device__ __forceinline__ float dot(const u16* a, const u16* b) {
  float sum = 0;
  if constexpr (kVectors) {
#pragma unroll 4
    for (int f = 0; f < kWidth; f += 8) {
      const uint4 x = *reinterpret_cast<const uint4*>(a + f), y = *reinterpret_cast<const uint4*>(b + f);
      const u32 left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum += Half::unpack(static_cast<u16>(left[i])) * Half::unpack(static_cast<u16>(right[i]));
        sum += Half::unpack(static_cast<u16>(left[i] >> 16)) * Half::unpack(static_cast<u16>(right[i] >> 16));
      }
    }
  } else {
    for (int f = 0; f < kWidth; ++f) sum += Half::unpack(a[f]) * Half::unpack(b[f]);
  }
  return sum;
}

// dS of a query and a key.
__device__ __forceinline__ float grad_score(const BackwardArgs& args, const Cell& cell, int head, const Position& q,
                                            const Position& k) {
  const int kv_head = head / (args.heads / args.heads_kv);
  const auto row = [&](const Rows& t, int first, const Position& p, int h) {
    return static_cast<const u16*>(t.data) + place(t, cell, first).row(p, h);
  };
  const float s = dot<kHeadDim>(row(args.query, cell.first_query, q, head), row(args.key, cell.first_key, k, kv_head));
  const float dp =
      dot<kHeadDimV>(row(args.grad_output, cell.first_query, q, head), row(args.value, cell.first_key, k, kv_head));
  const float* statistics =
      static_cast<const float*>(args.statistics.data) + place(args.statistics, cell, cell.first_query).row(q, head);
  const float x = s * args.scale_log2 + bias_at(args, bias_row(args, cell, head, q), k) - statistics[0];
  return exp2_approx(x) * (dp - statistics[1]);
}

extern "C" __global__ void __launch_bounds__(kBiasThreads, 2) backward_bias(const __grid_constant__ BackwardArgs args) {
  int entry = static_cast<int>(blockIdx.x), offset[3] = {0, 0, 0};  // key - query
  long long to = 0;
#pragma unroll
  for (int a = 2; a >= kFirstAxis; --a) {
    const int extent = 2 * kWindow[a] - 1, at = entry % extent;
    offset[a] = at - (kWindow[a] - 1);
    to += at * args.grad_bias.axis[a];
    entry /= extent;
  }
  const int head = entry;
  to += head * args.grad_bias.head;

  int classes = args.batch;
  for (int a = kFirstAxis; a < 3; ++a) classes *= args.work.classes[a];
  double sum = 0;
  for (int index = 0; index < classes; ++index) {
    const Cell cell = make_cell(args, index);
    Span queries[3] = {{0, 1}, {0, 1}, {0, 1}};
    int count = 1;
#pragma unroll
    for (int a = kFirstAxis; a < 3; ++a) {
      const int len = cell.grid.axis[a].queries;
      queries[a] = geometry::intersect(Span{0, len}, Span{-offset[a], len - offset[a]});
      count *= queries[a].size();
    }
    for (int i = threadIdx.x; i < count; i += kBiasThreads) {
      Position q = {{0, 0, 0}}, k = {{0, 0, 0}};
      int rest = i;
      bool seen = true;
#pragma unroll
      for (int a = 2; a >= kFirstAxis; --a) {
        q.at[a] = queries[a].begin + rest % queries[a].size();
        k.at[a] = q.at[a] + offset[a];
        rest /= queries[a].size();
        seen = seen && geometry::window(cell.grid.axis[a], q.at[a]).contains(k.at[a]);
      }
      if (seen) sum += grad_score(args, cell, head, q, k);
    }
  }

  __shared__ double sums[kBiasThreads];
  sums[threadIdx.x] = sum;
  for (int step = kBiasThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
  }
  if (threadIdx.x != 0) return;
  const float total = static_cast<float>(sums[0]);
  if constexpr (kBiasType == kTypeF32) static_cast<float*>(args.grad_bias.data)[to] = total;
  if constexpr (kBiasType == kTypeF64) static_cast<double*>(args.grad_bias.data)[to] = sums[0];
  if constexpr (kBiasType == kTypeBf16)
    static_cast<u16*>(args.grad_bias.data)[to] = static_cast<u16>(pack_bf16(total, 0));
  if constexpr (kBiasType == kTypeF16)
    static_cast<u16*>(args.grad_bias.data)[to] = static_cast<u16>(pack_f16(total, 0));
}

}  // namespace vicus::gpu
