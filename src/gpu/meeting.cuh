// How a warp meets a tile of columns: whether its rows see the tile, all of it, or what of it; and which part of the tile it
// multiplies. Blocks of queries meet tiles of keys, blocks of keys meet tiles of queries (kOwnsKeys): rows are what the block
// owns, columns what it meets. Windows are alike from both sides, a span of positions per axis.
//
// Constants of the prologue: those of tiles.cuh and keys.cuh, kRowBlocks, kChunk (columns that a warp takes together),
// kSplits (warps that share rows), kStages, kAdditionalTile (keys are additional tokens), kPreScale, kBiasKind.
#pragma once

#include "bias.cuh"
#include "keys.cuh"

namespace vicus::gpu {

constexpr Extents kOwnTile = kAdditionalTile ? Extents{{1, 1, kKeys}} : kOwnsKeys ? kKeyTile : kQueryTile;
constexpr Extents kOwnBox = kAdditionalTile ? kOwnTile : kOwnsKeys ? kKeyBox : kQueryBox;
constexpr Extents kMetTile = kOwnsKeys ? kQueryTile : kKeyTile;
constexpr Extents kMetPart = kOwnsKeys ? kQueryBox : kKeyBox;
constexpr int kOwnHeads = kOwnsKeys ? 1 : kTileHeads, kMetHeads = kOwnsKeys ? kTileHeads : 1;
constexpr int kOwnRows = kOwnHeads * kOwnTile.count();
constexpr int kWarpRows = 16 * kRowBlocks;
constexpr int kRows = kWarps / kSplits * kWarpRows;
constexpr int kMetColumns = kMetHeads * kMetPart.count();
constexpr int kColumnSteps = (kMetColumns + 15) / 16;  // of 16 columns

static_assert(kRows >= kOwnRows && kWarps % kSplits == 0 && kMetColumns <= 256);
static_assert(kGathers ? !kAdditional && kTileHeads == 1 && kSplits == 1 && kOwnBox.count() == kWarpRows
                       : kOwnsKeys || kKeys % 16 == 0);

// What the positions of the block's tile see on each axis, and how many of them exist.
struct Windows {
  Span seen[3][kOwnTile.at[0] > kOwnTile.at[1] && kOwnTile.at[0] > kOwnTile.at[2] ? kOwnTile.at[0]
               : kOwnTile.at[1] > kOwnTile.at[2]                                  ? kOwnTile.at[1]
                                                                                  : kOwnTile.at[2]];
  int count[3];
};

// `tile`: the positions that exist. `sees(a, p)`: the span that position p sees on axis a. Each axis begins with another
// warp: the axes take turns, or the code of one would follow that of the other.
template <class Sees>
__device__ __forceinline__ void note_windows(Windows& windows, const Box& tile, const Sees& sees) {
#pragma unroll
  for (int a = kFirstAxis; a < 3; ++a) {
    const int count = tile.axis[a].size(), turn = threadIdx.x / 32 + kWarps - (2 - a) % kWarps;
    for (int i = turn % kWarps * 32 + threadIdx.x % 32; i < kOwnTile.at[a]; i += kThreads) {
      windows.seen[a][i] = i < count ? sees(a, tile.axis[a].begin + i) : Span{0, 0};
      if (i == 0) windows.count[a] = count;
    }
  }
}

// Number r of the tile's positions, from where the tile begins.
__device__ __forceinline__ Position own_position(int row) {
  return boxed_position<kOwnTile, kOwnBox>(row % kOwnTile.count());
}

// The rows of the calling warp, and the box of positions around them, from where the tile begins.
__device__ __forceinline__ int first_row() { return threadIdx.x / 32 / kSplits * kWarpRows; }
__device__ __forceinline__ Box positions_of_rows(int first) {
  Box box;
  const int last = first + kWarpRows - 1;
  if constexpr (kGathers) {
    const Position p = own_position(first);
    for (int a = 0; a < 3; ++a) box.axis[a] = {p.at[a], p.at[a] + kOwnBox.at[a]};
  } else {  // row-major: all positions of an axis once a slower one changes
    bool same = first / kOwnTile.count() == last / kOwnTile.count();
    const Position p = own_position(first), q = own_position(last);
    for (int a = kFirstAxis; a < 3; ++a) {
      box.axis[a] = same ? Span{p.at[a], q.at[a] + 1} : Span{0, kOwnTile.at[a]};
      same = same && p.at[a] == q.at[a];
    }
  }
  return box;
}

// A tile that the block meets: keys or additional tokens that begin at `origin`, `tokens` of the latter; or queries of
// `heads` heads, before `end`.
struct MetTile {
  Position origin;
  bool additional;
  int tokens, heads, end[3];
};

__device__ __forceinline__ MetTile met_tile(const ForwardArgs& args, const KeyWalk& walk) {
  MetTile tile;
  tile.origin = walk.origin;
  tile.additional = kAdditional && walk.additional;
  tile.tokens = tile.additional ? args.additional - walk.origin.at[2] : 0;
  tile.heads = 1;
  return tile;
}
__device__ __forceinline__ MetTile met_tile(const QueryTile& queries) {
  MetTile tile;
  tile.additional = false;
  tile.heads = queries.heads;
  for (int a = 0; a < 3; ++a) {
    tile.origin.at[a] = queries.box.axis[a].begin;
    tile.end[a] = queries.box.axis[a].end;
  }
  return tile;
}

// Column c of the part that a warp meets, for one head.
__device__ __forceinline__ Position met_position(const Position& origin, int c) {
  return box_position<kMetPart.at[1], kMetPart.at[2]>(origin, c);
}

// Rows of the tile between a line of the part and the next, and between a plane and the next; none where the part has one.
constexpr int kBetweenLines = kMetPart.at[0] * kMetPart.at[1] > 1 ? kMetTile.at[2] - kMetPart.at[2] : 0;
constexpr int kBetweenPlanes = kMetPart.at[0] > 1 ? (kMetTile.at[1] - kMetPart.at[1]) * kMetTile.at[2] : 0;
constexpr bool kContiguous = kBetweenLines == 0 && kBetweenPlanes == 0;
// Rows of zeros that follow a tile, so that columns beyond it, which are masked, need no care.
constexpr int kSpareRows = kGathers && kContiguous && (kOwnsKeys || kMetColumns % kChunk != 0) ? kChunk - 1 : 0;

// Where the columns of a part lie that starts at row `first` of a tile in shared memory.
struct MetRows {
  int first;
  // Column 16 n + i.
  __device__ __forceinline__ int row(int n, int i) const {
    if constexpr (!kGathers) return 16 * n + i;
    if constexpr (kContiguous) return first + 16 * n + i;
    const u32 c = geometry::lo(16 * n + i, kMetColumns - 1);
    return first + c + c / kMetPart.at[2] * kBetweenLines + c / (kMetPart.at[1] * kMetPart.at[2]) * kBetweenPlanes;
  }
};

// Of all stages, once, before the first tile is used.
template <int kWidth, int kElements>
__device__ __forceinline__ void clear_spare_rows(u16 (&tiles)[kStages][kElements]) {
  if constexpr (kSpareRows > 0) {
    constexpr int kSpare = kSpareRows * Layout<kWidth>::kStride;
    for (int s = 0; s < kStages; ++s) {
      uint4* rows = reinterpret_cast<uint4*>(tiles[s] + kElements - kSpare);
      for (int i = threadIdx.x; i < kSpare / 8; i += kThreads) rows[i] = {0, 0, 0, 0};
    }
  }
}

// Bit c is set when column c of the part is seen.
constexpr int kMaskWords = (kMetColumns + 31) / 32;
struct ColumnMask {
  u32 word[kMaskWords];
};

template <bool kLong>
struct BitsOf {
  using Type = u32;
};
template <>
struct BitsOf<true> {
  using Type = u64;
};

// Adds columns [begin, end) to a mask.
__device__ __forceinline__ void add_columns(ColumnMask& mask, int begin, int end) {
#pragma unroll
  for (int w = 0; w < kMaskWords; ++w) {
    const int first = geometry::hi(begin - 32 * w, 0);
    mask.word[w] |= bit_mask(first, geometry::hi(end - 32 * w - first, 0));
  }
}

// Of the columns of a box, those whose last axis is in `line`: bits of a line, repeated.
using Line = BitsOf<(kMetPart.at[2] > 32)>::Type;
__device__ __forceinline__ void keep_in_lines(ColumnMask& mask, Line line) {
  constexpr int kLine = kMetPart.at[2], kLines = kMetColumns / kLine;
#pragma unroll
  for (int w = 0; w < kMaskWords; ++w) {
    u32 bits = 0;
#pragma unroll
    for (int j = 0; j < kLines; ++j) {
      const int at = j * kLine - 32 * w;  // where the line begins in the word
      if (at >= 0 && at < 32) bits |= static_cast<u32>(line) << at;
      if (at < 0 && at > -kLine) bits |= static_cast<u32>(line >> -at);
    }
    mask.word[w] &= bits;
  }
}

// The box of what is seen and the part that starts at `origin`, in all heads that exist.
__device__ __forceinline__ ColumnMask column_mask(const Span (&seen)[3], const Position& origin, int heads) {
  int begin[3], end[3];
  for (int a = kFirstAxis; a < 3; ++a) {
    begin[a] = geometry::hi(seen[a].begin - origin.at[a], 0);
    end[a] = geometry::lo(seen[a].end - origin.at[a], kMetPart.at[a]);
  }
  constexpr int kLine = kMetPart.at[2], kPlane = kMetPart.at[1] * kLine;
  ColumnMask mask = {};
#pragma unroll
  for (int h = 0; h < kMetHeads; ++h) {
    if (kMetHeads > 1 && h >= heads) continue;
#pragma unroll
    for (int i = 0; i < kMetPart.at[0]; ++i) {
      if (kRank == 3 && (i < begin[0] || i >= end[0])) continue;
      const int first = (h * kMetPart.at[0] + i) * kPlane;
      if constexpr (kRank == 1) add_columns(mask, first + begin[2], first + end[2]);
      else add_columns(mask, first + begin[1] * kLine, first + end[1] * kLine);
    }
  }
  static_assert(kRank == 1 || kLine <= 64);
  if constexpr (kRank > 1) {
    const int length = geometry::hi(end[2] - begin[2], 0);
    if constexpr (kLine <= 32) keep_in_lines(mask, bit_mask(begin[2], length));
    else keep_in_lines(mask, length >= 64 ? ~0ull : ((1ull << length) - 1) << begin[2]);
  }
  return mask;
}

// Of each row of a lane's accumulators, two bits for every block of 8 columns: whether they are seen.
using Bits = BitsOf<(kMetColumns > 128)>::Type;
struct SeenBits {
  Bits at[kRowBlocks][2];
};

// Bits 8 n and 8 n + 1 of a word, n < 4, side by side: the factor moves each pair to the highest byte, and nothing else.
__device__ __forceinline__ u32 pairs_of_bytes(u32 word) { return (word & 0x03030303u) * 0x01041040u >> 24; }

// Where a warp meets a tile.
struct Meeting {
  TileUse use;
  Position origin;  // of the part that it meets
  MetRows rows;
  bool additional;
};

__device__ __forceinline__ Meeting meet(const Windows& windows, const MetTile& tile) {
  Meeting m;
  m.additional = tile.additional;
  m.origin = tile.origin;
  const int first = first_row();
  bool seen = true, whole = kMetColumns % (kChunk * kSplits) == 0 && tile.heads == kMetHeads;
  if (kRows > kOwnRows) whole = whole && first + kWarpRows <= kOwnRows;
  if (kAdditional && tile.additional) {
    whole = whole && tile.tokens >= kKeys;
  } else {
    const Box own = positions_of_rows(kGathers ? first : anew(first));
    for (int a = kFirstAxis; a < 3; ++a) {
      const int end = geometry::lo(own.axis[a].end, windows.count[a]);
      seen = seen && own.axis[a].begin < end;
      whole = whole && end == own.axis[a].end;
      // Neither end of a window decreases from position to position.
      const Span low = windows.seen[a][own.axis[a].begin], high = windows.seen[a][geometry::hi(end - 1, 0)];
      const Span hull = {low.begin, high.end};
      Span core = {high.begin, low.end};
      if (kAdditionalTile) core.end = geometry::lo(core.end, tile.end[a]);
      if constexpr (kGathers) {  // the planner made the part large enough for what is in both
        const int skipped = geometry::hi(hull.begin - tile.origin.at[a], 0), most = kMetTile.at[a] - kMetPart.at[a];
        // Blocks of keys look for columns that are seen: of contiguous rows, those beyond the tile do no harm.
        m.origin.at[a] += kContiguous && kOwnsKeys && most > 0 ? skipped : geometry::lo(skipped, most);
      }
      seen = seen && !geometry::intersect(hull, {tile.origin.at[a], tile.origin.at[a] + kMetTile.at[a]}).empty();
      whole = whole && core.contains({m.origin.at[a], m.origin.at[a] + kMetPart.at[a]});
    }
  }
  m.use = !seen ? TileUse::skip : whole ? TileUse::whole : TileUse::masked;
  m.rows = {((m.origin.at[0] - tile.origin.at[0]) * kMetTile.at[1] + m.origin.at[1] - tile.origin.at[1]) *
                kMetTile.at[2] +
            m.origin.at[2] - tile.origin.at[2]};
  return m;
}

// Which columns of the part the rows of the lane see.
__device__ __forceinline__ SeenBits seen_bits(const Windows& windows, const MetTile& tile, const Position& origin) {
  SeenBits seen;
  const int first = first_row();
#pragma unroll
  for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int lane = threadIdx.x % 32, row = first + 16 * block + 8 * half + lane / 4;
      ColumnMask mask;
      if (kAdditional && tile.additional) {
        mask = {};
        add_columns(mask, 0, tile.tokens);
      } else {
        const Position p = own_position(row);
        Span spans[3];
        for (int a = kFirstAxis; a < 3; ++a) {
          spans[a] = windows.seen[a][p.at[a]];
          if (kAdditionalTile) spans[a].end = geometry::lo(spans[a].end, tile.end[a]);
        }
        mask = column_mask(spans, origin, tile.heads);
      }
      Bits& bits = seen.at[block][half];
      bits = 0;
      for (int w = 0; w < kMaskWords; ++w) {
        bits |= static_cast<Bits>(pairs_of_bytes(mask.word[w] >> (2 * (lane % 4)))) << (8 * w);
      }
      if (kRows > kOwnRows && row >= kOwnRows) bits = 0;
    }
  }
  return seen;
}

}  // namespace vicus::gpu
