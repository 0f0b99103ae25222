// Boxes of tokens in shared memory, as the copy engine puts them there: which rows are whose, how boxes are loaded, what a
// tile of keys is to queries. Constants of the prologue, besides those of tiles.cuh: kWarpgroups (for the math), kStackAxis
// (query tiles are cut along this axis into one box per warpgroup), kStages, kHeadDim, kHeadDimV.
#pragma once

#include "sm90.cuh"
#include "walk.cuh"

namespace vicus::gpu {

constexpr int kDq = (kHeadDim + 15) / 16 * 16;  // features of the first product
constexpr int kSlab = 64;                       // features of a row of 128 bytes
constexpr int kSlabs = (kHeadDim + kSlab - 1) / kSlab, kValueSlabs = (kHeadDimV + kSlab - 1) / kSlab;
constexpr int kRows = 64;  // of a warpgroup
constexpr int kWarpgroupThreads = 128;
constexpr bool kCrowd = kMinBlocks > 1;  // several blocks on a multiprocessor, of one warpgroup each: none but it loads
constexpr int kThreads = (kCrowd ? kWarpgroups : 1 + kWarpgroups) * kWarpgroupThreads;
constexpr int kBoxRows = kPositions / kWarpgroups * kTileHeads;  // of a warpgroup's rows, those that are loaded
constexpr bool kHeadAxis = kRank < 3;  // maps have an axis for heads; otherwise heads follow the features

static_assert(kKeys % 16 == 0 && kKeys <= 256 && kPositions % kWarpgroups == 0 && kBoxRows <= kRows);
static_assert(!kCrowd || kWarpgroups == 1);
static_assert(kTileQ[kStackAxis] % kWarpgroups == 0);
static_assert(kHeadAxis || kTileHeads == 1);

// What a tile of keys is to queries whose windows have this hull and core.
__device__ __forceinline__ TileUse use_of(const Box& hull, const Box& core, const KeyWalk& walk, int additional) {
  if (kAdditional && walk.additional) {
    return walk.origin.at[2] + kKeys <= additional ? TileUse::whole : TileUse::masked;
  }
  bool seen = true, whole = true;
  for (int a = kFirstAxis; a < 3; ++a) {
    const Span tile = {walk.origin.at[a], walk.origin.at[a] + kTileKv[a]};
    seen = seen && !geometry::intersect(hull.axis[a], tile).empty();
    whole = whole && core.axis[a].contains(tile);
  }
  return !seen ? TileUse::skip : whole ? TileUse::whole : TileUse::masked;
}

// A place in a ring of stages.
template <int kCount>
struct RingOf {
  int stage = 0;
  u32 phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kCount) {
      stage = 0;
      phase ^= 1;
    }
  }
};
using Ring = RingOf<kStages>;

// Extent of a warpgroup's box.
__device__ __forceinline__ constexpr int box_extent(int axis) {
  return axis == kStackAxis ? kTileQ[axis] / kWarpgroups : kTileQ[axis];
}

// Copies of the code that are compiled for a tile. Both: one for tiles that all rows of a warpgroup see, one that makes masks
// beside products. Masked: no tile fits into the windows of all rows, but perhaps at the edges of the layout. Asked: masks are
// rare and cheap, one copy asks for them when it needs them.
enum class Copies { both, masked, asked };
__device__ constexpr Copies copies_of_step(bool rare) {
  for (int a = kFirstAxis; a < 3 && !kDense; ++a) {
    if (kStep[a] == 1 && kWindow[a] - (box_extent(a) - 1) < kTileKv[a]) return Copies::masked;
  }
  return rare ? Copies::asked : Copies::both;
}

// Where the box of a warpgroup starts.
__device__ __forceinline__ Position box_origin(const QueryTile& tile, int warpgroup) {
  Position p;
  for (int a = 0; a < 3; ++a) p.at[a] = tile.box.axis[a].begin + (a == kStackAxis ? warpgroup * box_extent(a) : 0);
  return p;
}

// Row r of a warpgroup: its box, row-major, and of each position the heads of the tile.
__device__ __forceinline__ Position box_position(const Position& origin, int row) {
  const int n = row / kTileHeads;
  Position p = origin;
  p.at[0] += n / (box_extent(1) * box_extent(2));
  p.at[1] += n / box_extent(2) % box_extent(1);
  p.at[2] += n % box_extent(2);
  return p;
}
__device__ __forceinline__ int box_head(const QueryTile& tile, int row) { return tile.head + row % kTileHeads; }

__device__ __forceinline__ bool box_has(const QueryTile& tile, int row, const Position& p) {
  bool inside = row < kBoxRows && (kTileHeads == 1 || row % kTileHeads < tile.heads);
  for (int a = kFirstAxis; a < 3; ++a) inside = inside && p.at[a] < tile.box.axis[a].end;
  return inside;
}

// Coordinates of a slab of a box of tokens in its map.
struct BoxCoordinates {
  int at[5];
};
__device__ __forceinline__ BoxCoordinates box_coordinates(int slab, int head, long long head_step,
                                                          const Position& token, int batch) {
  if constexpr (kHeadAxis) return {{slab * kSlab, head, token.at[2], token.at[1], batch}};
  return {{slab * kSlab + head * static_cast<int>(head_step), token.at[2], token.at[1], token.at[0], batch}};
}

// All slabs of a box of tokens, to slabs of `kSlabRows` rows. `head_step` is elements from head to head. A line is loaded in
// pieces, of `kPiece` positions and `kPieceRows` rows; tokens are `step` apart.
template <int kBoxSlabs, int kSlabRows, int kPieces = 1, int kPiece = 0, int kPieceRows = 0>
__device__ __forceinline__ void load_box(const TensorMap& map, const u16* to, const u64& barrier, int batch, int head,
                                         long long head_step, const Position& token, int step = 1) {
#pragma unroll
  for (int s = 0; s < kBoxSlabs; ++s) {
    const u32 smem = smem_address(to + s * kSlabRows * kSlab);
    BoxCoordinates c = box_coordinates(s, head, head_step, token, batch);
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
      tma_load(smem + piece * kPieceRows * kSlab * 2, map, smem_address(&barrier), c.at);
      c.at[2] += kPiece * step;
    }
  }
}

// Rows of a tile from `present` on become zeros, by a warpgroup. What follows a sequence is of others, perhaps NaN, which
// weights of zero would keep. Every warpgroup clears for itself: where two meet, both write zeros.
template <int kBoxSlabs, int kElements>
__device__ __forceinline__ void clear_rows(u16 (&tile)[kBoxSlabs][kElements], int present) {
  constexpr int kChunks = kSlab * 2 / 16;  // of a row
#pragma unroll 1
  for (int slab = 0; slab < kBoxSlabs; ++slab) {
    uint4* const rows = reinterpret_cast<uint4*>(tile[slab]);
#pragma unroll 1
    for (int i = present * kChunks + static_cast<int>(threadIdx.x) % kWarpgroupThreads; i < kElements / 8;
         i += kWarpgroupThreads) {
      rows[i] = uint4{0, 0, 0, 0};
    }
  }
}

// What a warpgroup has written to shared memory is seen by its products afterwards; by a named barrier of its own.
__device__ __forceinline__ void show_products(int barrier) {
  fence_proxy_async();
  barrier_sync(barrier, kWarpgroupThreads);
}

// Products take 16 features at a time: where those of the next head follow the last 8, zeros take their place in a warpgroup's
// rows. What is not finite in the other operand then makes a NaN, and its row is done again, value by value.
template <int kWidth>
constexpr bool kNextHeadFollows = !kHeadAxis && kWidth % 16 != 0;
template <int kWidth>
__device__ __forceinline__ void clear_next_head(u16* rows) {
  if constexpr (kNextHeadFollows<kWidth>) {
    const int row = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    constexpr int kEight = kWidth % kSlab / 8;
    u16* const slab = rows + kWidth / kSlab * kRows * kSlab;
    if (row < kRows) reinterpret_cast<uint4*>(slab)[row * (kSlab / 8) + (kEight ^ row % 8)] = uint4{0, 0, 0, 0};
  }
}

// A tile of a packed sequence.
struct SequenceTile {
  int sequence, tile;
};

// At place `n`: of the last of the sequences whose places begin there or before, perhaps past its end.
__device__ __forceinline__ SequenceTile find_sequence(const int* cumulative, int tokens, int sequences, int extent,
                                                      int n) {
  const auto first_place = [&](int s) { return places_before(geometry::clamp(cumulative[s], 0, tokens), s, extent); };
  int first = 0, past = sequences;
  while (past - first > 1) {
    const int middle = first + (past - first) / 2;
    if (first_place(middle) <= n) first = middle;
    else past = middle;
  }
  return {first, geometry::hi(n - first_place(first), 0)};
}

// The token at a position of a cell; boxes step by the dilation by themselves.
__device__ __forceinline__ Position token_of(const Cell& cell, const Position& p, int first) {
  Position token;
  for (int a = 0; a < 3; ++a) {
    token.at[a] = a < kFirstAxis ? 0 : geometry::token_of(p.at[a], kDilation[a], cell.residue[a]);
  }
  token.at[2] += first;
  return token;
}

}  // namespace vicus::gpu
