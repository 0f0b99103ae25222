// Loads in a crowd: a block takes one tile of queries, and what its warpgroup waits for is hidden by the other blocks of the
// multiprocessor. No warp is set aside to load, as registers are what limits their number; a thread of the math does, while the
// products of the tile before run.
#pragma once

#include "sm90_tiles.cuh"

namespace vicus::gpu {

static_assert(!kCrowd || (!kRagged && !kKeyParts));

// The keys and values of a tile, to the stage of `ring`.
__device__ __forceinline__ void feed(const Sm90Args& args, Smem& smem, const Cell& cell, int kv_head,
                                     const KeyWalk& walk, Ring ring) {
  Ring values = ring;
  load_key(args, smem, cell, kv_head, walk, ring);
  load_value(args, smem, cell, kv_head, walk, values);
}

// Those of the tile after the one at `ring`.
__device__ __forceinline__ void feed_next(const Sm90Args& args, Smem& smem, Ring ring) {
  const TilePlace& place = smem.job[0][0].place;
  KeyWalk walk = smem.key_tile[ring.stage].walk;
  walk.next(smem.hull[0]);
  ring.next();
  feed(args, smem, make_cell(args.forward, place.cell), place.kv_head, walk, ring);
}

// Loads the first keys and values, once queries are on their way. The one thread that loads.
__device__ __forceinline__ void begin_feed(const Sm90Args& args, Smem& smem, const Job& job, const Cell& cell,
                                           int kv_head, const Box& hull) {
  KeyWalk walk;
  walk.begin(hull);
  feed(args, smem, cell, kv_head, walk, {});
  smem.hull[0] = hull;
  smem.job[0][0] = job;
}

}  // namespace vicus::gpu
