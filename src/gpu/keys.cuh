// The tile of queries of a block, and the key tiles that it meets: their rows in shared memory. Constants of the prologue:
// kWarps, kHeadDim, kHeadDimV, kAdditional.
#pragma once

#include "load.cuh"
#include "walk.cuh"

namespace vicus::gpu {

constexpr int kThreads = kWarps * 32;
constexpr int kDq = Layout<kHeadDim>::kFeatures, kDv = Layout<kHeadDimV>::kFeatures;
constexpr int kQStride = Layout<kHeadDim>::kStride, kVStride = Layout<kHeadDimV>::kStride;  // of a row in shared memory

struct Sources {
  Placed key, value, additional_key, additional_value;
  int limit[3];
};

// What all threads of a block share about it. One thread works it out; the others read what they need when they need it,
// which takes fewer instructions and fewer registers.
struct QueryBlock {
  BlockTiles all;
  Box hull;  // of the keys that the tile sees
  int tiles;
  Sources from;
  Placed query;

  __device__ __forceinline__ void prepare(const ForwardArgs& args) {
    all = tiles_of_block(args);
    const Cell& cell = all.cell;
    for (int a = 0; a < 3; ++a) {
      hull.axis[a] = a < kFirstAxis ? Span{0, 1} : geometry::hull(cell.grid.axis[a], all.tile.box.axis[a]);
      from.limit[a] = hull.axis[a].end;
    }
    tiles = key_tiles_of(hull);
    if (kAdditional) tiles += geometry::ceil_div(args.additional, kKeys);
    from.key = place(args.key, cell, cell.first_key);
    from.value = place(args.value, cell, cell.first_key);
    if (kAdditional) {
      from.additional_key = place_additional(args.additional_keys, cell);
      from.additional_value = place_additional(args.additional_values, cell);
    }
    query = place(args.query, cell, cell.first_query);
  }
};

__device__ __forceinline__ void load_keys(const ForwardArgs& args, const Sources& from, const KeyWalk& walk, int head,
                                          u16* key, u16* value) {
  if (kAdditional && walk.additional) {
    const auto row = [&](int c, Position& p) {
      p.at[0] = p.at[1] = 0;
      p.at[2] = walk.origin.at[2] + c;
      return p.at[2] < args.additional;
    };
    load_rows<kKeys, kHeadDim, kThreads>(args.additional_keys, from.additional_key, head, row, key);
    load_rows<kKeys, kHeadDimV, kThreads>(args.additional_values, from.additional_value, head, row, value);
  } else {
    const Load keys = {args.key, from.key, key}, values = {args.value, from.value, value};
    constexpr int kExtent1 = kTileKv[1], kExtent2 = kTileKv[2];
    if constexpr (kHeadDim == kHeadDimV) {
      load_box<kKeys, kExtent1, kExtent2, kHeadDim, kThreads, 2>({keys, values}, head, walk.origin, from.limit);
    } else {
      load_box<kKeys, kExtent1, kExtent2, kHeadDim, kThreads, 1>({keys}, head, walk.origin, from.limit);
      load_box<kKeys, kExtent1, kExtent2, kHeadDimV, kThreads, 1>({values}, head, walk.origin, from.limit);
    }
  }
}

}  // namespace vicus::gpu
