// The key tiles of a block, one after the other. Constants of the prologue, besides those of tiles.cuh: kAdditional.
#pragma once

#include "tiles.cuh"

namespace vicus::gpu {

// The key tiles of a block: boxes over the hull, row-major, then the additional tokens.
struct KeyWalk {
  Position origin;
  bool additional = false;
  __device__ __forceinline__ void begin(const Box& hull) {
    for (int a = 0; a < 3; ++a) origin.at[a] = a < kFirstAxis ? 0 : hull.axis[a].begin;
    if (hull.empty()) begin_additional();
  }
  __device__ __forceinline__ void begin_additional() {
    additional = true;
    origin.at[0] = origin.at[1] = origin.at[2] = 0;
  }
  __device__ __forceinline__ void next(const Box& hull) {
    if (kAdditional && additional) {
      origin.at[2] += kKeys;
      return;
    }
    for (int a = 2; a >= kFirstAxis; --a) {
      origin.at[a] += kTileKv[a];
      if (origin.at[a] < hull.axis[a].end) return;
      origin.at[a] = hull.axis[a].begin;
    }
    begin_additional();
  }
};

// What a tile is to some queries.
enum class TileUse { skip, whole, masked };

}  // namespace vicus::gpu
