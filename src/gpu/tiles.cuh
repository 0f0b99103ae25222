// Tiles of queries and keys: which row is which position, where it lies in memory, which keys it sees. Windows come from
// geometry.h. Constants of the prologue: kTileQ, kTileHeads, kTurns (tiles along the heads that a block computes one after
// the other), kTileKv (extents), kWarpQ and kWarpKv (extents of the boxes of queries and keys that a warp owns or meets of
// them), kOwnsKeys (blocks own keys and meet queries, not the other way round), kWindow, kStep, kCausal, kDilation, kRank,
// kDense (a band axis with kBandLeft, kBandRight, kBandBottom), kPacked, kKeyLengths.
#pragma once

#include "args.h"
#include "mma.cuh"
#include "overlap.cuh"
#include "vicus/geometry.h"

namespace vicus::gpu {

using geometry::Axis;
using geometry::Box;
using geometry::Grid;
using geometry::Span;

constexpr int kPositions = kTileQ[0] * kTileQ[1] * kTileQ[2];  // of a query tile, for one head
constexpr int kKeys = kTileKv[0] * kTileKv[1] * kTileKv[2];    // of a key tile
constexpr int kFirstAxis = 3 - kRank;                          // axes before have one position
constexpr int kNoQuery = -1;

struct Position {
  int at[3];
};

// One sequence of one residue class. Rows of a tensor start at offset + position . step.
struct Cell {
  Grid grid;
  int batch, first_query, first_key;
  int residue[3];
};

// `n` steps of a tensor; positions, heads and batches are not negative, which halves what this takes.
__device__ __forceinline__ long long steps(int n, long long step) {
  return static_cast<long long>(static_cast<u32>(n)) * step;
}

struct Placed {
  long long origin, step[3], head;
  __device__ __forceinline__ long long row(const Position& p, int h) const {
    long long offset = origin + steps(h, head);
    for (int a = kFirstAxis; a < 3; ++a) offset += steps(p.at[a], step[a]);
    return offset;
  }
};

__device__ __forceinline__ Placed place(const Rows& t, const Cell& cell, int first_token) {
  Placed p;
  p.origin = steps(cell.batch, t.batch) + steps(first_token, t.token[2]);
  p.head = t.head;
  for (int a = kFirstAxis; a < 3; ++a) {
    p.origin += steps(cell.residue[a], t.token[a]);
    p.step[a] = t.token[a] * kDilation[a];
  }
  return p;
}

// Rows of the additional tokens [B, T, Hkv, D], as positions (0, 0, t).
__device__ __forceinline__ Placed place_additional(const Rows& t, const Cell& cell) {
  Placed p;
  p.origin = steps(cell.batch, t.batch);
  p.head = t.head;
  p.step[0] = p.step[1] = 0;
  p.step[2] = t.token[2];
  return p;
}

// Where tile number `n` of a launch is: along the axes, the longest tiles first with `kLongestFirst`, and along heads and cells.
struct TileIndex {
  int at[3], head_block, cell;
};
template <bool kLongestFirst>
__device__ __forceinline__ TileIndex tile_index(const TileOrder& order, int n) {
  TileIndex tile;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    tile.at[a] = 0;
    if (a < kFirstAxis) continue;
    tile.at[a] = order.tiles[a].remainder(order.step[a].divide(n));
    if (kLongestFirst && (kDense || kCausal[a])) tile.at[a] = static_cast<int>(order.tiles[a].value) - 1 - tile.at[a];
  }
  n = order.all.divide(n);
  tile.cell = order.head_blocks.divide(n);
  tile.head_block = n - tile.cell * static_cast<int>(order.head_blocks.value);
  return tile;
}

// Tiles differ in length: in causal attention, and most along the causal axes of windows.
constexpr bool kUneven = kDense ? kBandRight >= 0 && kBandLeft < 0 : kCausal[0] || kCausal[1] || kCausal[2];

// A cell by its number: sequences slowest, residue classes of the last axis fastest.
struct CellPlace {
  int sequence, residue[3];
};

__device__ __forceinline__ CellPlace cell_place(const ForwardArgs& args, int index) {
  CellPlace place;
  for (int a = 2; a >= 0; --a) {
    place.residue[a] = 0;
    if (a < kFirstAxis || kDilation[a] == 1) continue;
    place.residue[a] = index % args.work.classes[a];
    index /= args.work.classes[a];
  }
  place.sequence = index;
  return place;
}

__device__ __forceinline__ Cell make_cell(const ForwardArgs& args, const CellPlace& place) {
  const int sequence = place.sequence;
  Cell cell;
  cell.batch = sequence;
  cell.first_query = cell.first_key = 0;
  for (int a = 0; a < 3; ++a) cell.residue[a] = place.residue[a];
  if constexpr (kDense) {
    int queries = args.len[2], keys = args.keys;
    // Nobody has checked the lists: whatever they hold, tokens are inside the tensors.
    if constexpr (kPacked) {
      cell.batch = 0;
      cell.first_query = geometry::clamp(args.cumulative_queries[sequence], 0, queries);
      cell.first_key = geometry::clamp(args.cumulative_keys[sequence], 0, keys);
      queries = geometry::clamp(args.cumulative_queries[sequence + 1], cell.first_query, queries) - cell.first_query;
      keys = geometry::clamp(args.cumulative_keys[sequence + 1], cell.first_key, keys) - cell.first_key;
    }
    if constexpr (kKeyLengths) keys = geometry::clamp(args.key_lengths[sequence], 0, keys);
    cell.grid.axis[2] = geometry::band_axis(queries, keys, kBandLeft, kBandRight, kBandBottom ? keys - queries : 0);
  } else {
    for (int a = kFirstAxis; a < 3; ++a) {
      const int len = geometry::class_len(args.len[a], kDilation[a], place.residue[a]);
      cell.grid.axis[a] = geometry::neighborhood_axis(len, kWindow[a], kStep[a], kCausal[a]);
    }
  }
  return cell;
}

// An axis of a cell in shared memory: the compiler knows the window again.
__device__ __forceinline__ Axis axis_of(const Cell& cell, int a) {
  const Axis& axis = cell.grid.axis[a];
  if constexpr (kDense) {
    return geometry::band_axis(axis.queries, axis.keys, kBandLeft, kBandRight, axis.offset);
  } else {
    return geometry::neighborhood_axis(axis.keys, kWindow[a], kStep[a], kCausal[a]);
  }
}

__device__ __forceinline__ Cell make_cell(const ForwardArgs& args, int index) {
  return make_cell(args, cell_place(args, index));
}

// A tile of queries: `heads` query heads of one key/value head times a box of positions.
struct QueryTile {
  Box box;
  int head, heads, kv_head;
  // The heads of the tile: number `block` along the heads.
  __device__ __forceinline__ void place_heads(const ForwardArgs& args, int block) {
    const int group = args.heads / args.heads_kv, blocks_of_group = geometry::ceil_div(group, kTileHeads);
    kv_head = block / blocks_of_group;
    const int first = block % blocks_of_group * kTileHeads;
    head = kv_head * group + first;
    heads = geometry::lo(kTileHeads, group - first);
  }
};

// Where the calling block works: its first tile along the heads, of `turns` that it computes one after the other.
struct BlockTiles {
  Cell cell;
  QueryTile tile;
  int first_head_block, turns;
};

__device__ __forceinline__ BlockTiles tiles_of_block(const ForwardArgs& args) {
  const int block = static_cast<int>(blockIdx.x);
  const TileIndex index = tile_index<true>(args.order, kUneven ? args.order.nth(block) : block);
  BlockTiles all;
  all.first_head_block = index.head_block * kTurns;
  all.turns = geometry::lo(kTurns, args.work.head_blocks - all.first_head_block);
  all.cell = make_cell(args, index.cell);
  all.tile.place_heads(args, all.first_head_block);
  for (int a = 0; a < 3; ++a) {
    all.tile.box.axis[a] =
        a < kFirstAxis ? Span{0, 1} : geometry::tile_span(index.at[a], kTileQ[a], all.cell.grid.axis[a].queries);
  }
  return all;
}

struct Extents {
  int at[3];
  __device__ constexpr int count() const { return at[0] * at[1] * at[2]; }
};
constexpr Extents kQueryTile = {{kTileQ[0], kTileQ[1], kTileQ[2]}}, kKeyTile = {{kTileKv[0], kTileKv[1], kTileKv[2]}};
constexpr Extents kQueryBox = {{kWarpQ[0], kWarpQ[1], kWarpQ[2]}}, kKeyBox = {{kWarpKv[0], kWarpKv[1], kWarpKv[2]}};

// Number r of a tile: boxes row-major over the tile, positions row-major over each.
template <Extents kTile, Extents kBox>
__device__ __forceinline__ Position boxed_position(u32 r) {
  // As constants of their own: the compiler would read members of a template's argument from memory.
  constexpr u32 kExtent1 = kBox.at[1], kExtent2 = kBox.at[2], kPlane = kExtent1 * kExtent2, kCount = kBox.count();
  constexpr u32 kBoxes1 = kTile.at[1] / kExtent1, kBoxes2 = kTile.at[2] / kExtent2, kExtent0 = kBox.at[0];
  const u32 p = r % kCount, box = r / kCount;
  Position at;
  at.at[0] = box / (kBoxes1 * kBoxes2) * kExtent0 + p / kPlane;
  at.at[1] = box / kBoxes2 % kBoxes1 * kExtent1 + p / kExtent2 % kExtent1;
  at.at[2] = box % kBoxes2 * kExtent2 + p % kExtent2;
  return at;
}

// Row r of a tile of queries: head-major, then by the boxes that warps own.
__device__ __forceinline__ Position row_position(const QueryTile& tile, int row) {
  Position at = boxed_position<kQueryTile, kOwnsKeys ? kQueryTile : kQueryBox>(row % kPositions);
  for (int a = 0; a < 3; ++a) at.at[a] += tile.box.axis[a].begin;
  return at;
}
__device__ __forceinline__ bool row_exists(const QueryTile& tile, int row, const Position& p) {
  bool inside = row < kTileHeads * kPositions;
  if (kTileHeads > 1) inside = inside & (row / kPositions < tile.heads);
  for (int a = kFirstAxis; a < 3; ++a) inside = inside & (p.at[a] < tile.box.axis[a].end);  // without branches
  return inside;
}

// Where row `index` of a tensor [B, *X, H, ...] is, whatever the order in memory.
struct RowIndex {
  long long batch;
  int head, token[3];
  __device__ __forceinline__ long long of(const Rows& t) const {
    long long at = batch * t.batch + head * t.head;
    for (int a = kFirstAxis; a < 3; ++a) at += token[a] * t.token[a];
    return at;
  }
};
template <bool kOfKey, class Int>
__device__ __forceinline__ RowIndex row_index_of(const ForwardArgs& args, Int index) {
  RowIndex row;
  const Int heads = static_cast<Int>(kOfKey ? args.heads_kv : args.heads);
  row.head = static_cast<int>(index % heads);
  index /= heads;
  for (int a = 2; a >= kFirstAxis; --a) {
    const Int length = static_cast<Int>(kOfKey && kDense ? args.keys : args.len[a]);
    row.token[a] = static_cast<int>(index % length);
    index /= length;
  }
  row.batch = static_cast<long long>(index);
  return row;
}
template <bool kOfKey = false>
__device__ __forceinline__ RowIndex row_index(const ForwardArgs& args, long long index) {
  // Divisions of 64 bits take a hundred instructions each.
  if (index >> 32 == 0) return row_index_of<kOfKey>(args, static_cast<u32>(index));
  return row_index_of<kOfKey>(args, static_cast<u64>(index));
}

// Key `c` of a box of kExtent1 by kExtent2 keys a plane that starts at `origin`.
template <int kExtent1, int kExtent2>
__device__ __forceinline__ Position box_position(const Position& origin, u32 c) {
  Position at;
  at.at[0] = origin.at[0] + c / (kExtent1 * kExtent2);
  at.at[1] = origin.at[1] + c / kExtent2 % kExtent1;
  at.at[2] = origin.at[2] + c % kExtent2;
  return at;
}
// Of a tile of keys.
__device__ __forceinline__ Position key_position(const Position& origin, int c) {
  return box_position<kTileKv[1], kTileKv[2]>(origin, c);
}

}  // namespace vicus::gpu
