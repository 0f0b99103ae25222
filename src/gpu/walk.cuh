// The key tiles of a block, one after the other. Constants of the prologue, besides those of tiles.cuh: kAdditional.
#pragma once

#include "tiles.cuh"

namespace vicus::gpu {

// Tiles of keys along an axis of a hull, and over all of it.
__device__ __forceinline__ int key_tiles_of(const Span& hull, int axis) {
  return geometry::ceil_div(geometry::hi(hull.size(), 0), kTileKv[axis]);
}
__device__ __forceinline__ int key_tiles_of(const Box& hull) {
  int tiles = 1;
  for (int a = kFirstAxis; a < 3; ++a) tiles *= key_tiles_of(hull.axis[a], a);
  return tiles;
}

// The key tiles of a block: boxes over the hull, row-major, then the additional tokens.
struct KeyWalk {
  Position origin;
  bool additional = false;
  __device__ __forceinline__ void begin(const Box& hull) {
    for (int a = 0; a < 3; ++a) origin.at[a] = a < kFirstAxis ? 0 : hull.axis[a].begin;
    if (hull.empty()) begin_additional();
  }
  // At the n-th tile.
  __device__ __forceinline__ void begin(const Box& hull, int n) {
    begin(hull);
    const int of_keys = key_tiles_of(hull);
    if (n >= of_keys) {
      begin_additional();
      origin.at[2] = (n - of_keys) * kKeys;
      return;
    }
    for (int a = 2; a >= kFirstAxis; --a) {
      const int tiles = key_tiles_of(hull.axis[a], a);
      origin.at[a] += n % tiles * kTileKv[a];
      n /= tiles;
    }
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

// The keys in the tile at `walk` of those in a box.
__device__ __forceinline__ Box keys_in_tile(Box keys, const KeyWalk& walk) {
  for (int a = kFirstAxis; a < 3; ++a) {
    keys.axis[a] = geometry::intersect(keys.axis[a], {walk.origin.at[a], walk.origin.at[a] + kTileKv[a]});
  }
  return keys;
}

// What a tile is to some queries.
enum class TileUse { skip, whole, masked };

}  // namespace vicus::gpu
