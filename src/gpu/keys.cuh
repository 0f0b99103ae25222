// The key tiles that a block of queries meets: their rows in shared memory. Constants of the prologue:
// kWarps, kHeadDim, kHeadDimV, kAdditional.
#pragma once

#include "load.cuh"
#include "walk.cuh"

namespace vicus::gpu {

constexpr int kThreads = kWarps * 32;
constexpr int kDq = (kHeadDim + 15) / 16 * 16;
constexpr int kDv = (kHeadDimV + 15) / 16 * 16;
constexpr int kQStride = kDq + 8, kVStride = kDv + 8;  // elements of a row in shared memory

struct Sources {
  Placed key, value, additional_key, additional_value;
  int limit[3];
};

__device__ __forceinline__ void load_keys(const ForwardArgs& args, const Sources& from, const KeyWalk& walk, int head,
                                          u16* key, u16* value) {
  if (kAdditional && walk.additional) {
    const auto row = [&](int c, Position& p) {
      p.at[0] = p.at[1] = 0;
      p.at[2] = walk.origin.at[2] + c;
      return p.at[2] < args.additional;
    };
    load_rows<kKeys, kHeadDim, kQStride, kThreads>(args.additional_keys, from.additional_key, head, row, key);
    load_rows<kKeys, kHeadDimV, kVStride, kThreads>(args.additional_values, from.additional_value, head, row, value);
  } else {
    const Load keys = {args.key, from.key, key}, values = {args.value, from.value, value};
    constexpr int kExtent1 = kTileKv[1], kExtent2 = kTileKv[2];
    if constexpr (kHeadDim == kHeadDimV) {
      load_box<kKeys, kExtent1, kExtent2, kHeadDim, kQStride, kThreads, 2>({keys, values}, head, walk.origin,
                                                                           from.limit);
    } else {
      load_box<kKeys, kExtent1, kExtent2, kHeadDim, kQStride, kThreads, 1>({keys}, head, walk.origin, from.limit);
      load_box<kKeys, kExtent1, kExtent2, kHeadDimV, kVStride, kThreads, 1>({values}, head, walk.origin, from.limit);
    }
  }
}

}  // namespace vicus::gpu
