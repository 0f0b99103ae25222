// Loads in a crowd: a block takes one tile of queries, and what its warpgroup waits for is hidden by the other blocks of the
// multiprocessor. No warp is set aside to load, as registers are what limits their number; a thread of the math does, a few
// instructions for each tile.
#pragma once

#include "sm90_tiles.cuh"

namespace vicus::gpu {

static_assert(!kCrowd || (!kRagged && !kKeyParts));

// The keys of a tile, where there is one left, and the values of the one before.
__device__ __forceinline__ void feed_key(const Sm90Args& args, Smem& smem) {
  Feed& feed = smem.feed;
  if (feed.keys_left == 0) return;
  const TilePlace& place = smem.job[0][0].place;
  load_key(args, smem, make_cell(args.forward, place.cell), place.kv_head, feed.walk, feed.keys);
  feed.walk.next(feed.hull);
  --feed.keys_left;
}
__device__ __forceinline__ void feed_value(const Sm90Args& args, Smem& smem) {
  Feed& feed = smem.feed;
  if (feed.values_left == 0) return;
  const TilePlace& place = smem.job[0][0].place;
  load_value(args, smem, make_cell(args.forward, place.cell), place.kv_head, smem.key_tile[feed.values.stage].walk,
             feed.values);
  --feed.values_left;
}

// Finds the block's tile, and loads what there is room for, but the last values.
__device__ __forceinline__ void begin_feed(const Sm90Args& args, Smem& smem) {
  Job& job = smem.job[0][0];
  job.place = place_of(args, static_cast<int>(blockIdx.x));
  const Cell cell = make_cell(args.forward, job.place.cell);
  const QueryTile tile = tile_of(job.place, cell);
  job.key_tiles = 0;
  if (tile.box.empty()) return;
  Feed& feed = smem.feed;
  feed = Feed{};
  feed.hull = hull_of(cell, tile);
  feed.walk.begin(feed.hull);
  job.key_tiles = feed.keys_left = feed.values_left = key_tiles_of(feed.hull) + additional_tiles(args.forward);
  load_query(args, smem, cell, tile, 0);
#pragma unroll 1
  for (int s = 0; s < kStages; ++s) {
    feed_key(args, smem);
    if (s + 1 < kStages) feed_value(args, smem);
  }
}

}  // namespace vicus::gpu
