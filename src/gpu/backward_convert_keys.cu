// dK and dV where several blocks have shared out the query heads that meet the same keys (sm90_backward.cu with kKeyParts): the
// sums of all of them, always in one order. A sum that is not finite may be so for what does not see the row: the warp does the
// row again.
#include "backward_convert.cuh"

namespace vicus::gpu {

constexpr int kKeyWidth = (kHeadDim + 15) / 16 * 16, kValueWidth = (kHeadDimV + 15) / 16 * 16;
constexpr int kFours = (kKeyWidth + kValueWidth) / 4;

// Where a row of keys is in its cell.
struct KeyPlace {
  Cell cell;
  Position key;
  bool exists;  // tokens after the last packed sequence are no keys
};
__device__ __forceinline__ KeyPlace place_of(const BackwardArgs& args, const RowIndex& row) {
  CellPlace cell = {static_cast<int>(row.batch), {0, 0, 0}};
  if (kPacked) cell.sequence = sequence_of(args.cumulative_keys, args.sequences, row.token[2]);
  KeyPlace place = {{}, {{0, 0, 0}}, true};
  for (int a = kFirstAxis; a < 3; ++a) {
    cell.residue[a] = row.token[a] % kDilation[a];
    place.key.at[a] = row.token[a] / kDilation[a];
  }
  place.cell = make_cell(args, cell);
  place.key.at[2] -= place.cell.first_key;
  if (kPacked) place.exists = place.key.at[2] >= 0 && place.key.at[2] < place.cell.grid.axis[2].keys;
  return place;
}

// A warp has a whole row: were dK done again by one and dV stored by another, who comes last would settle dV's bits.
extern "C" __global__ void __launch_bounds__(kConvertThreads, 3)
    convert_keys(const __grid_constant__ BackwardArgs args) {
  begin_after_others(args.followed);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const RowIndex row = row_index<true>(args, static_cast<long long>(blockIdx.x) * (kConvertThreads / 32) + warp);
  if (row.batch >= args.batch) return;
  if (kPacked && !place_of(args, row).exists) return;
  float finite = 0;
#pragma unroll
  for (int first = 0; first < kFours; first += 32) {
    const bool of_key = first + lane < kKeyWidth / 4;
    const Rows &sums = of_key ? args.key_sums : args.value_sums, &out = of_key ? args.grad_key : args.grad_value;
    if (first + lane >= kFours || out.data == nullptr) continue;
    const int four = first + lane - (of_key ? 0 : kKeyWidth / 4), width = of_key ? kKeyWidth : kValueWidth;
    const float* at = static_cast<const float*>(sums.data) + row.of(sums) + 4 * four;
    float4 sum = *reinterpret_cast<const float4*>(at);
    for (int part = 1; part < args.key_parts; ++part) {
      at += args.key_rows * width;
      const float4 more = *reinterpret_cast<const float4*>(at);
      sum = float4{sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
    }
    finite +=
        put_four(sum, four, of_key ? kHeadDim : kHeadDimV, of_key ? args.scale_log2 * 0.693147180559945309f : 1.0f,
                 static_cast<u16*>(out.data) + row.of(out));
  }
  if (!__any_sync(~0u, finite != 0)) return;
  __syncwarp();
  const KeyPlace place = place_of(args, row);
  careful_gradients<true>(args, place.cell, row.head, place.key);
}

}  // namespace vicus::gpu
