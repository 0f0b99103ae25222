// Biases of logits, one by one. Constants of the prologue: kBiasKind (none, relative, additive), kBiasType.
#pragma once

#include "tiles.cuh"

namespace vicus::gpu {

enum { kBiasNone = 0, kBiasRelative = 1, kBiasAdditive = 2 };
enum { kTypeF32 = 0, kTypeF64 = 1, kTypeBf16 = 2, kTypeF16 = 3 };  // the order of vicus::DType

constexpr float kLog2E = 1.44269504088896341f;

__device__ __forceinline__ float load_bias(const void* data, long long index) {
  if constexpr (kBiasType == kTypeF32) return static_cast<const float*>(data)[index];
  if constexpr (kBiasType == kTypeF64) return static_cast<float>(static_cast<const double*>(data)[index]);
  const u16 x = static_cast<const u16*>(data)[index];
  return kBiasType == kTypeBf16 ? from_bf16(x) : from_f16(x);
}

// Where the bias of query `q` and the key at position 0 lies.
__device__ __forceinline__ long long bias_row(const ForwardArgs& args, const Cell& cell, int head, const Position& q) {
  long long index = cell.batch * args.bias.batch + head * args.bias.head;
  if constexpr (kBiasKind == kBiasRelative) {
    for (int a = kFirstAxis; a < 3; ++a) index += (kWindow[a] - 1 - q.at[a]) * args.bias.axis[a];
  } else {
    index += q.at[2] * args.bias.axis[1];
  }
  return index;
}
// Bias of key `k` times log2 e; -inf hides the pair.
__device__ __forceinline__ float bias_at(const ForwardArgs& args, long long row, const Position& k) {
  if constexpr (kBiasKind == kBiasRelative) {
    for (int a = kFirstAxis; a < 3; ++a) row += k.at[a] * args.bias.axis[a];
  } else {
    row += k.at[2] * args.bias.axis[2];
  }
  return load_bias(args.bias.data, row) * kLog2E;
}

}  // namespace vicus::gpu
