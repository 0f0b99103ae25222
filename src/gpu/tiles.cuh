// Tiles of queries and keys: which row is which position, where it lies in memory, which keys it sees. Windows come from
// geometry.h. Constants of the prologue: kTileQ, kTileHeads, kTurns (tiles along the heads that a block computes one after
// the other), kTileKv (extents), kWarpQ (extents of the boxes whose rows follow
// each other), kWarpKv (extents of the part of a key tile that a warp meets), kWindow, kStep, kCausal, kDilation, kRank,
// kDense (a band axis with kBandLeft, kBandRight, kBandBottom), kPacked, kKeyLengths.
#pragma once

#include "args.h"
#include "mma.cuh"
#include "vicus/geometry.h"

namespace vicus::gpu {

using geometry::Axis;
using geometry::Box;
using geometry::Grid;
using geometry::Span;

constexpr int kPositions = kTileQ[0] * kTileQ[1] * kTileQ[2];  // of a query tile, for one head
constexpr int kKeys = kTileKv[0] * kTileKv[1] * kTileKv[2];    // of a key tile
constexpr int kMet = kWarpKv[0] * kWarpKv[1] * kWarpKv[2];     // of them, those that a warp meets
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

struct Placed {
  long long origin, step[3], head;
  __device__ __forceinline__ long long row(const Position& p, int h) const {
    long long offset = origin + h * head;
    for (int a = kFirstAxis; a < 3; ++a) offset += p.at[a] * step[a];
    return offset;
  }
};

__device__ __forceinline__ Placed place(const Rows& t, const Cell& cell, int first_token) {
  Placed p;
  p.origin = cell.batch * t.batch + first_token * t.token[2];
  p.head = t.head;
  for (int a = kFirstAxis; a < 3; ++a) {
    p.origin += cell.residue[a] * t.token[a];
    p.step[a] = t.token[a] * kDilation[a];
  }
  return p;
}

// Rows of the additional tokens [B, T, Hkv, D], as positions (0, 0, t).
__device__ __forceinline__ Placed place_additional(const Rows& t, const Cell& cell) {
  Placed p;
  p.origin = cell.batch * t.batch;
  p.head = t.head;
  p.step[0] = p.step[1] = 0;
  p.step[2] = t.token[2];
  return p;
}

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
  int block = static_cast<int>(blockIdx.x);
  int at[3] = {0, 0, 0};
  for (int a = 2; a >= kFirstAxis; --a) {
    at[a] = block % args.work.tiles[a];
    block /= args.work.tiles[a];
    if (kDense || kCausal[a]) at[a] = args.work.tiles[a] - 1 - at[a];  // the longest first
  }
  const int blocks = geometry::ceil_div(args.work.head_blocks, kTurns);
  BlockTiles all;
  all.first_head_block = block % blocks * kTurns;
  all.turns = geometry::lo(kTurns, args.work.head_blocks - all.first_head_block);
  all.cell = make_cell(args, block / blocks);
  all.tile.place_heads(args, all.first_head_block);
  for (int a = 0; a < 3; ++a) {
    all.tile.box.axis[a] =
        a < kFirstAxis ? Span{0, 1} : geometry::tile_span(at[a], kTileQ[a], all.cell.grid.axis[a].queries);
  }
  return all;
}

// Row r of a tile: head-major, then boxes of kWarpQ row-major over kTileQ, then positions row-major over the box.
__device__ __forceinline__ Position row_position(const QueryTile& tile, int row) {
  constexpr int kBoxed = kWarpQ[0] * kWarpQ[1] * kWarpQ[2], kBoxes1 = kTileQ[1] / kWarpQ[1],
                kBoxes2 = kTileQ[2] / kWarpQ[2];
  const int p = row % kBoxed, box = row % kPositions / kBoxed;
  Position at;
  at.at[0] = tile.box.axis[0].begin + box / (kBoxes1 * kBoxes2) * kWarpQ[0] + p / (kWarpQ[1] * kWarpQ[2]);
  at.at[1] = tile.box.axis[1].begin + box / kBoxes2 % kBoxes1 * kWarpQ[1] + p / kWarpQ[2] % kWarpQ[1];
  at.at[2] = tile.box.axis[2].begin + box % kBoxes2 * kWarpQ[2] + p % kWarpQ[2];
  return at;
}
__device__ __forceinline__ bool row_exists(const QueryTile& tile, int row, const Position& p) {
  bool inside = row < kTileHeads * kPositions && row / kPositions < tile.heads;
  for (int a = kFirstAxis; a < 3; ++a) inside = inside && p.at[a] < tile.box.axis[a].end;
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
template <class Int>
__device__ __forceinline__ RowIndex row_index_of(const ForwardArgs& args, Int index) {
  RowIndex row;
  row.head = static_cast<int>(index % static_cast<Int>(args.heads));
  index /= static_cast<Int>(args.heads);
  for (int a = 2; a >= kFirstAxis; --a) {
    row.token[a] = static_cast<int>(index % static_cast<Int>(args.len[a]));
    index /= static_cast<Int>(args.len[a]);
  }
  row.batch = static_cast<long long>(index);
  return row;
}
__device__ __forceinline__ RowIndex row_index(const ForwardArgs& args, long long index) {
  // Divisions of 64 bits take a hundred instructions each.
  if (index >> 32 == 0) return row_index_of(args, static_cast<u32>(index));
  return row_index_of(args, static_cast<u64>(index));
}

// Key `c` of a box of kExtent1 by kExtent2 keys a plane that starts at `origin`.
template <int kExtent1, int kExtent2>
__device__ __forceinline__ Position box_position(const Position& origin, int c) {
  Position at;
  at.at[0] = origin.at[0] + c / (kExtent1 * kExtent2);
  at.at[1] = origin.at[1] + c / kExtent2 % kExtent1;
  at.at[2] = origin.at[2] + c % kExtent2;
  return at;
}
// Of a tile of keys, and of the part of one that a warp meets.
__device__ __forceinline__ Position key_position(const Position& origin, int c) {
  return box_position<kTileKv[1], kTileKv[2]>(origin, c);
}
__device__ __forceinline__ Position met_position(const Position& origin, int c) {
  return box_position<kWarpKv[1], kWarpKv[2]>(origin, c);
}

// Bit c of the mask is set when key c of the part that starts at `origin` lies in `seen`, one axis after the other: the
// bits of a line, repeated for every line that is seen.
constexpr int kMaskWords = (kMet + 63) / 64;
struct KeyMask {
  u64 word[kMaskWords];
};

__device__ __forceinline__ u64 bits_between(int begin, int end) {  // of 64
  const u64 below_end = end >= 64 ? ~0ull : end <= 0 ? 0ull : (1ull << end) - 1;
  return begin <= 0 ? below_end : begin >= 64 ? 0ull : below_end & ~((1ull << begin) - 1);
}

__device__ __forceinline__ KeyMask key_mask(const Span (&seen)[3], const Position& origin) {
  KeyMask mask;
  if constexpr (kRank == 1) {
    const int begin = seen[2].begin - origin.at[2], end = seen[2].end - origin.at[2];
    for (int w = 0; w < kMaskWords; ++w) mask.word[w] = bits_between(begin - 64 * w, end - 64 * w);
  } else {
    for (int w = 0; w < kMaskWords; ++w) mask.word[w] = 0;
    const u64 line =
        bits_between(seen[2].begin - origin.at[2], seen[2].end - origin.at[2]) & bits_between(0, kWarpKv[2]);
#pragma unroll
    for (int i = 0; i < kWarpKv[0]; ++i) {
      const bool in_plane = kRank < 3 || seen[0].contains(origin.at[0] + i);
#pragma unroll
      for (int j = 0; j < kWarpKv[1]; ++j) {
        const u64 here = in_plane && seen[1].contains(origin.at[1] + j) ? line : 0ull;
        const int first = (i * kWarpKv[1] + j) * kWarpKv[2];  // a line may lie in two words
        mask.word[first / 64] |= here << (first % 64);
        if (first / 64 + 1 < kMaskWords && first % 64 + kWarpKv[2] > 64) {
          mask.word[first / 64 + 1] |= here >> (64 - first % 64);
        }
      }
    }
  }
  return mask;
}

}  // namespace vicus::gpu
