// The unfused operators with tensor cores: a warp owns 16 positions (a box of one residue class) of one head and walks, 16
// at a time, over the box of positions that any of them sees or is seen by.
//
// Nothing of the operands goes through shared memory: each lane loads its part of a fragment from the tensors, 16 bytes at
// a time, and neighbouring warps find the rows they share in the caches. A product does not mind in which order features
// or columns come, as long as both of its operands agree, so what a lane loads at once is made what it has to hold.
//
// Constants of the prologue, besides those of unfused.cuh: kTileQ (extents of the box), Half, kHold, kMinBlocks. All rows start at
// multiples of 16 bytes and have a multiple of 16 bytes.
//
// Grid: a warp per box along x (residue classes slowest, last axis fastest), [B, H] (keys: [B, Hkv]) along y.
#pragma once

#include "unfused.cuh"

namespace vicus::gpu {

constexpr int kTileRows = 16;
static_assert(kTileQ[0] * kTileQ[1] * kTileQ[2] == kTileRows && sizeof(Storage) == 2);

struct Tile {
  geometry::Grid grid;
  int residue[3];
  Box box;

  // Row `r`; beyond the end of the box, its last position, and `has` is false.
  __device__ __forceinline__ Token position(int r) const {
    const Token p = wanted(r);
    Token t;
#pragma unroll
    for (int a = 0; a < 3; ++a) t.at[a] = geometry::lo(p.at[a], box.axis[a].end - 1);
    return t;
  }
  __device__ __forceinline__ bool has(int r) const {
    const Token p = wanted(r);
    bool all = true;
#pragma unroll
    for (int a = kFirstAxis; a < 3; ++a) all = all && p.at[a] < box.axis[a].end;
    return all;
  }
  __device__ __forceinline__ Token token(const Token& position) const {
    Token t;
#pragma unroll
    for (int a = 0; a < 3; ++a) t.at[a] = geometry::token_of(position.at[a], kDilation[a], residue[a]);
    return t;
  }

 private:
  __device__ __forceinline__ Token wanted(int r) const {
    return {{box.axis[0].begin + r / (kTileQ[1] * kTileQ[2]), box.axis[1].begin + r / kTileQ[2] % kTileQ[1],
             box.axis[2].begin + r % kTileQ[2]}};
  }
};

// Calls `each(batch, head, tile)` for what the warp has of [B, heads, boxes].
template <class Each>
__device__ __forceinline__ void for_each_tile(const UnfusedArgs& args, int heads, const Each& each) {
  u32 index = blockIdx.x * static_cast<u32>(kWarps) + threadIdx.x / 32;
  Tile tile;
  int at[3] = {0, 0, 0};
#pragma unroll
  for (int a = 2; a >= kFirstAxis; --a) {
    const int tiles = geometry::ceil_div(geometry::class_len(args.len[a], kDilation[a], 0), kTileQ[a]);
    at[a] = static_cast<int>(index % tiles);
    index /= tiles;
  }
#pragma unroll
  for (int a = 2; a >= 0; --a) {
    const int classes = geometry::lo(kDilation[a], args.len[a]);
    tile.residue[a] = static_cast<int>(index % classes);
    index /= classes;
    const int len = geometry::class_len(args.len[a], kDilation[a], tile.residue[a]);
    tile.grid.axis[a] = geometry::neighborhood_axis(len, kWindow[a], kStep[a], kCausal[a]);
    tile.box.axis[a] = a < kFirstAxis ? Span{0, 1} : geometry::tile_span(at[a], kTileQ[a], len);
  }
  if (index > 0 || tile.box.empty()) return;
  for (int y = blockIdx.y; y < args.batch * heads; y += gridDim.y) each(y / heads, y % heads, tile);
}

// Rows of one head at the positions of a residue class.
struct Lines {
  long long origin, step[3];
  __device__ __forceinline__ long long at(const Token& position) const {
    long long offset = origin;
#pragma unroll
    for (int a = kFirstAxis; a < 3; ++a) offset += position.at[a] * step[a];
    return offset;
  }
};

__device__ __forceinline__ Lines lines_of(const Rows& t, int batch, int head, const Tile& tile) {
  Lines lines;
  lines.origin = batch * t.batch + head * t.head;
#pragma unroll
  for (int a = kFirstAxis; a < 3; ++a) {
    lines.origin += tile.residue[a] * t.token[a];
    lines.step[a] = t.token[a] * kDilation[a];
  }
  return lines;
}

// A walk over a box, row-major, 16 positions at a time.
struct Walk {
  Token position;  // where the box has ended, its first one
  int left;        // positions from here to the end, this one included; 0 or less where it has ended

  __device__ __forceinline__ void begin(const Box& box, int index) {
    left = static_cast<int>(box.volume()) - index;
    position = {{0, 0, 0}};
    int rest = index;
#pragma unroll
    for (int a = 2; a > kFirstAxis; --a) {
      position.at[a] = box.axis[a].begin + rest % box.axis[a].size();
      rest /= box.axis[a].size();
    }
    position.at[kFirstAxis] = box.axis[kFirstAxis].begin + rest;
    stay(box);
  }
  // Goes `jump.at` further in each axis, and to the next line or plane where one ends.
  __device__ __forceinline__ void advance(const Box& box, const Token& jump, int positions) {
    left -= positions;
    int carry = 0;
#pragma unroll
    for (int a = 2; a >= kFirstAxis; --a) {
      position.at[a] += jump.at[a] + carry;
      carry = a > kFirstAxis && position.at[a] >= box.axis[a].end;
      if (carry) position.at[a] -= box.axis[a].size();
    }
    stay(box);
  }

 private:
  __device__ __forceinline__ void stay(const Box& box) {
    if (left > 0) return;
#pragma unroll
    for (int a = kFirstAxis; a < 3; ++a) position.at[a] = box.axis[a].begin;
  }
};

// `positions` of a box, as steps along its axes.
__device__ __forceinline__ Token jump_of(const Box& box, int positions) {
  Token jump = {{0, 0, 0}};
#pragma unroll
  for (int a = 2; a > kFirstAxis; --a) {
    jump.at[a] = positions % box.axis[a].size();
    positions /= box.axis[a].size();
  }
  jump.at[kFirstAxis] = positions;
  return jump;
}

// The window of a query. Where an axis is not causal, all windows of the class have one size.
struct Window {
  int first[3], size[3];

  __device__ __forceinline__ void note(const geometry::Grid& grid, const Token& query) {
#pragma unroll
    for (int a = kFirstAxis; a < 3; ++a) {
      const Span span = geometry::window(grid.axis[a], query.at[a]);
      first[a] = span.begin;
      if (kCausal[a]) size[a] = span.size();
    }
  }
  // The slot of a key in the scores of this query; -1 where it does not see the key.
  __device__ __forceinline__ int slot_of(const geometry::Grid& grid, const Token& key) const {
    int slot = 0;
    bool sees = true;
#pragma unroll
    for (int a = kFirstAxis; a < 3; ++a) {
      const int from = key.at[a] - first[a];
      const int most = kCausal[a] ? size[a] : geometry::lo(kWindow[a], grid.axis[a].keys);
      sees = sees && static_cast<u32>(from) < static_cast<u32>(most);
      slot = slot * kWindow[a] + from;
    }
    return sees ? slot : -1;
  }
};

// Eight features of a row; zeros beyond its end.
__device__ __forceinline__ uint4 load_piece(const Storage* row, int feature) {
  if (kHeadDim % 64 != 0 && feature >= kHeadDim) return uint4{0, 0, 0, 0};
  return __ldg(reinterpret_cast<const uint4*>(row + feature));
}

}  // namespace vicus::gpu
