// How a warp meets a tile of keys: whether its rows see the tile, all of it, or what of it; and which part of the tile it
// multiplies. Constants of the prologue: those of tiles.cuh and keys.cuh, kRowBlocks, kPreScale.
#pragma once

#include "keys.cuh"

namespace vicus::gpu {

constexpr int kWarpRows = 16 * kRowBlocks;
constexpr int kRows = kWarps * kWarpRows;
constexpr int kKeyBlocks = (kMet + 15) / 16 * 2;
constexpr bool kGathers = kMet < kKeys || kKeys % 16 != 0;

static_assert(kRows >= kTileHeads * kPositions && !(kGathers && kAdditional) && kMet <= 128);

// What the rows of a warp see, per axis: each row, any (hull), all (core).
struct Windows {
  Span seen[kRows][3];
  Box hull[kWarps], core[kWarps];
};

__device__ __forceinline__ void note_windows(Windows& windows, const BlockTiles& all) {
  const Cell& cell = all.cell;
  const QueryTile& tile = all.tile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Box hull, core;
  for (int a = 0; a < 3; ++a) {
    hull.axis[a] = {geometry::kMaxLen, 0};
    core.axis[a] = {0, geometry::kMaxLen};
  }
  for (int r = lane; r < kWarpRows; r += 32) {
    const int row = warp * kWarpRows + r;
    const Position p = row_position(tile, row);
    const bool exists = row_exists(tile, row, p);
    for (int a = kFirstAxis; a < 3; ++a) {
      const Span seen = exists ? geometry::window(cell.grid.axis[a], p.at[a]) : Span{0, 0};
      windows.seen[row][a] = seen;
      if (!exists) continue;
      hull.axis[a] = {geometry::lo(hull.axis[a].begin, seen.begin), geometry::hi(hull.axis[a].end, seen.end)};
      core.axis[a] = {geometry::hi(core.axis[a].begin, seen.begin), geometry::lo(core.axis[a].end, seen.end)};
    }
  }
  for (int a = kFirstAxis; a < 3; ++a) {
    hull.axis[a] = {__reduce_min_sync(~0u, hull.axis[a].begin), __reduce_max_sync(~0u, hull.axis[a].end)};
    core.axis[a] = {__reduce_max_sync(~0u, core.axis[a].begin), __reduce_min_sync(~0u, core.axis[a].end)};
    if (lane == 0) {
      windows.hull[warp].axis[a] = hull.axis[a];
      windows.core[warp].axis[a] = core.axis[a];
    }
  }
}

__device__ __forceinline__ TileUse use_of(const Box& hull, const Box& core, const KeyWalk& walk, const Position& met,
                                          int additional) {
  if (kAdditional && walk.additional) {
    return walk.origin.at[2] + kKeys <= additional ? TileUse::whole : TileUse::masked;
  }
  bool seen = true, whole = kMet % 16 == 0;
  for (int a = kFirstAxis; a < 3; ++a) {
    seen = seen && !geometry::intersect(hull.axis[a], {walk.origin.at[a], walk.origin.at[a] + kTileKv[a]}).empty();
    whole = whole && core.axis[a].contains({met.at[a], met.at[a] + kWarpKv[a]});
  }
  return !seen ? TileUse::skip : whole ? TileUse::whole : TileUse::masked;
}

// Where the part of the tile starts that a warp meets: the planner made it large enough for what is in both.
__device__ __forceinline__ Position met_origin(const Box& hull, const Position& tile) {
  if constexpr (!kGathers) return tile;
  Position met = tile;
  for (int a = kFirstAxis; a < 3; ++a) {
    met.at[a] += geometry::lo(geometry::hi(hull.axis[a].begin - tile.at[a], 0), kTileKv[a] - kWarpKv[a]);
  }
  return met;
}

// The rows of a key tile that a lane addresses, of the part that starts at key row `first`: the 16 keys from 16 n on, of
// them number `of_lane`.
struct MetRows {
  int first;
  __device__ __forceinline__ int row(int n, int of_lane) const {
    if constexpr (!kGathers) return 16 * n + of_lane;
    const int c = geometry::lo(16 * n + of_lane, kMet - 1);  // masked beyond
    const Position p = met_position({{0, 0, 0}}, c);
    return first + (p.at[0] * kTileKv[1] + p.at[1]) * kTileKv[2] + p.at[2];
  }
};
__device__ __forceinline__ MetRows met_rows(const Position& met, const Position& tile) {
  return {((met.at[0] - tile.at[0]) * kTileKv[1] + met.at[1] - tile.at[1]) * kTileKv[2] + met.at[2] - tile.at[2]};
}

// Of each row of a lane's accumulators, two bits for every block of 8 keys: whether its keys are seen.
struct SeenBits {
  u32 at[kRowBlocks][2];
};

// Bits 8 n and 8 n + 1 of a word, n < 8, side by side.
__device__ __forceinline__ u32 pairs_of_bytes(u64 word) {
  word &= 0x0303030303030303ull;
  word = (word | word >> 6) & 0x000f000f000f000full;
  word = (word | word >> 12) & 0x000000ff000000ffull;
  return static_cast<u32>(word | word >> 24) & 0xffff;
}

// Where a warp meets a tile of keys.
struct Meeting {
  TileUse use;
  Position origin;  // of the part that it meets
  MetRows rows;
  SeenBits seen;
  bool additional;
};

__device__ __forceinline__ Meeting meet(const ForwardArgs& args, const Windows& windows, const KeyWalk& walk) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Meeting m;
  m.origin = met_origin(windows.hull[warp], walk.origin);
  m.use = use_of(windows.hull[warp], windows.core[warp], walk, m.origin, args.additional);
  m.rows = met_rows(m.origin, walk.origin);
  m.additional = kAdditional && walk.additional;
  if (m.use == TileUse::skip || (!kPreScale && m.use == TileUse::whole)) return m;
#pragma unroll
  for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      KeyMask mask;
      if (m.additional) {
        for (int w = 0; w < kMaskWords; ++w) {
          mask.word[w] = bits_between(0, args.additional - walk.origin.at[2] - 64 * w);
        }
      } else {
        Span seen[3];
        for (int a = kFirstAxis; a < 3; ++a) {
          seen[a] = windows.seen[warp * kWarpRows + 16 * block + 8 * half + lane / 4][a];
        }
        mask = key_mask(seen, m.origin);
      }
      u32& bits = m.seen.at[block][half];
      bits = 0;
      for (int w = 0; w < kMaskWords; ++w) bits |= pairs_of_bytes(mask.word[w] >> (2 * (lane % 4))) << (16 * w);
    }
  }
  return m;
}

}  // namespace vicus::gpu
