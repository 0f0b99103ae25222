// Tiles of pairs for the plain kernels. Rows belong to a block, columns come tile after tile: rows are queries and columns
// keys, or with kRowsAreKeys (set before this text) the other way round. Each row sees a box of columns: `window` of a
// query, `queries_of` a key; a tile of pairs that all rows see needs no mask.
//
// Constants of the prologue: those of tiles.cuh, bias.cuh and plain.cuh, kHeadDim, kHeadDimV, kAdditional.
#pragma once

#include "bias.cuh"
#include "plain.cuh"
#include "plain_args.h"
#include "tiles.cuh"

namespace vicus::gpu {

constexpr int kColCount = kRowsAreKeys ? kTileHeads * kPositions : kKeys;
constexpr int kCols = (kColCount + 7) / 8 * 8;
constexpr int kThreadCols = kCols / kColLanes;

static_assert(kRows >= (kRowsAreKeys ? kKeys : kTileHeads * kPositions));

using Scores = Acc[kLaneRows][kThreadCols];

struct Block {
  Cell cell;
  QueryTile rows;       // rows are keys: their box, and their key/value head; `head`, `heads` of the columns at hand
  bool tokens = false;  // rows are additional tokens
};

__device__ __forceinline__ Position row_at(const Block& block, int r) {
  if constexpr (kRowsAreKeys) {
    Position origin;
    for (int a = 0; a < 3; ++a) origin.at[a] = block.rows.box.axis[a].begin;
    if (!block.tokens) return key_position(origin, r);
    origin.at[2] += r;
    return origin;
  } else {
    return row_position(block.rows, r);
  }
}
__device__ __forceinline__ bool row_is(const Block& block, int r, const Position& p) {
  if constexpr (kRowsAreKeys) {
    bool inside = r < kKeys;
    for (int a = kFirstAxis; a < 3; ++a) inside = inside && p.at[a] < block.rows.box.axis[a].end;
    return inside;
  } else {
    return row_exists(block.rows, r, p);
  }
}
// Head of row r in tensors that have a row for it.
__device__ __forceinline__ int row_head(const Block& block, int r) {
  return kRowsAreKeys ? block.rows.kv_head : block.rows.head + r / kPositions;
}

// The columns of a block: boxes over the hull, row-major, then tiles of additional tokens.
struct ColWalk {
  Position origin;
  bool additional;
  static __device__ __forceinline__ constexpr int extent(int a) { return kRowsAreKeys ? kTileQ[a] : kTileKv[a]; }
  __device__ __forceinline__ void begin(const Box& hull) {
    for (int a = 0; a < 3; ++a) origin.at[a] = a < kFirstAxis ? 0 : hull.axis[a].begin;
    additional = false;
    if (hull.empty()) begin_additional();
  }
  __device__ __forceinline__ void begin_additional() {
    additional = true;
    origin.at[0] = origin.at[1] = origin.at[2] = 0;
  }
  __device__ __forceinline__ void next(const Box& hull) {
    if (kAdditional && additional) {
      origin.at[2] += kColCount;
      return;
    }
    for (int a = 2; a >= kFirstAxis; --a) {
      origin.at[a] += extent(a);
      if (origin.at[a] < hull.axis[a].end) return;
      origin.at[a] = hull.axis[a].begin;
    }
    begin_additional();
  }
  __device__ __forceinline__ Position position(int c) const {
    if (kRowsAreKeys) {
      const int p = c % kPositions;
      return {{origin.at[0] + p / (kTileQ[1] * kTileQ[2]), origin.at[1] + p / kTileQ[2] % kTileQ[1],
               origin.at[2] + p % kTileQ[2]}};
    }
    if (kAdditional && additional) return {{0, 0, origin.at[2] + c}};
    return key_position(origin, c);
  }
  static __device__ __forceinline__ int tiles(const Box& hull) {
    if (hull.empty()) return 0;
    int count = 1;
    for (int a = kFirstAxis; a < 3; ++a) count *= geometry::ceil_div(hull.axis[a].size(), extent(a));
    return count;
  }
};

// What each row sees, and what any (hull) and all (core) of them see.
struct Views {
  long long bias[kBiasKind == kBiasNone ? 1 : kRows];  // the row's part of where a bias lies
  Span row[kRows][3];
  Box hull, core;
};

__device__ __forceinline__ Span seen_by(const geometry::Axis& axis, int p) {
  if constexpr (kRowsAreKeys) return geometry::queries_of(axis, {p, p + 1});
  else return geometry::window(axis, p);
}

// The part of a query and the part of a key of where their bias lies.
__device__ __forceinline__ long long query_bias(const ForwardArgs& args, const Block& block, const Position& q, int c) {
  return bias_row(args, block.cell, block.rows.head + c / kPositions, q);
}
__device__ __forceinline__ long long key_bias(const ForwardArgs& args, const Position& k) {
  long long part = 0;
  for (int a = kFirstAxis; a < 3; ++a) part += k.at[a] * args.bias.axis[a];
  return part;
}

// By the whole block; a barrier must follow.
__device__ __forceinline__ void note_views(const ForwardArgs& args, const Block& block, Views& views) {
  for (int r = threadIdx.x; r < kRows; r += kThreads) {
    const Position p = row_at(block, r);
    const bool exists = row_is(block, r, p);
    if (kBiasKind != kBiasNone) views.bias[r] = kRowsAreKeys ? key_bias(args, p) : query_bias(args, block, p, r);
#pragma unroll
    for (int a = kFirstAxis; a < 3; ++a) {
      const geometry::Axis& axis = block.cell.grid.axis[a];
      views.row[r][a] = !exists ? Span{0, 0} : block.tokens ? Span{0, axis.queries} : seen_by(axis, p.at[a]);
    }
  }
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    const geometry::Axis& axis = block.cell.grid.axis[a];
    const Span rows = block.rows.box.axis[a];
    Span hull = {0, 1}, core = {0, 1};
    if (a >= kFirstAxis && block.tokens) {
      hull = core = {0, axis.queries};
    } else if (a >= kFirstAxis && kRowsAreKeys) {
      hull = geometry::queries_of(axis, rows);
      core = {seen_by(axis, rows.end - 1).begin, seen_by(axis, rows.begin).end};
    } else if (a >= kFirstAxis) {
      hull = geometry::hull(axis, rows);
      core = geometry::core(axis, rows);
    }
    views.hull.axis[a] = hull;
    views.core.axis[a] = core;
  }
}

// Whether every row sees every column of the tile.
__device__ __forceinline__ bool whole_tile(const Block& block, const Views& views, const ColWalk& walk,
                                           int additional) {
  if (kColCount != kCols) return false;
  if (!kRowsAreKeys && kAdditional && walk.additional) return walk.origin.at[2] + kCols <= additional;
  bool whole = !kRowsAreKeys || block.rows.heads == kTileHeads;
  for (int a = kFirstAxis; a < 3; ++a) {
    whole = whole && views.core.axis[a].contains(Span{walk.origin.at[a], walk.origin.at[a] + ColWalk::extent(a)});
  }
  return whole;
}

// The compiler takes loads no further than this; for registers.
__device__ __forceinline__ void keep_loads_here() { asm volatile("" ::: "memory"); }

// Products to logits in powers of two: times the scale, plus the bias; -inf for pairs that are not seen.
__device__ __forceinline__ void make_logits(const ForwardArgs& args, Acc scale, const Block& block, const ColWalk& walk,
                                            const Views& views, bool whole, Scores& scores) {
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) scores[i][j] *= scale;
  }
  const bool more_keys = !kRowsAreKeys && kAdditional && walk.additional;
  const bool biased = kBiasKind != kBiasNone && !more_keys && !block.tokens;
  if (whole && !biased) return;
#pragma unroll
  for (int j = 0; j < kThreadCols; ++j) {
    const int c = col_of(j);
    const Position col = walk.position(c);
    bool counts = c < kColCount;
    if (kRowsAreKeys) counts = counts && c / kPositions < block.rows.heads;
    if (more_keys) counts = counts && col.at[2] < args.additional;
    long long bias_part = 0;
    if (kBiasKind != kBiasNone) bias_part = kRowsAreKeys ? query_bias(args, block, col, c) : key_bias(args, col);
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int r = row_of(i);
      bool sees = counts;
      if (!more_keys) {
        for (int a = kFirstAxis; a < 3; ++a) sees = sees && views.row[r][a].contains(col.at[a]);
      }
      if constexpr (kBiasKind != kBiasNone) {
        if (biased && sees) {
          const Acc bias = load_typed<kBiasType>(args.bias.data, views.bias[r] + bias_part);
          scores[i][j] += bias * kLog2OfE;
          sees = bias != -kInfinity;
        }
      }
      if (!sees) scores[i][j] = -kInfinity;
    }
    keep_loads_here();
  }
}

// Tiles of the block's rows and of its columns to shared memory: columns [first, first + kColumns) of a tensor.
template <int kColumns, int kWidth>
__device__ __forceinline__ void load_block_rows(const Rows& tensor, const Placed& placed, const Block& block, int first,
                                                Acc* smem) {
  load_tile<kRows, kColumns, kWidth>(
      tensor.data, first,
      [&](int r, long long& offset) {
        const Position p = row_at(block, r);
        if (!row_is(block, r, p)) return false;
        offset = placed.row(p, row_head(block, r));
        return true;
      },
      smem);
}

__device__ __forceinline__ bool column_offset(const Placed& placed, const Block& block, const ColWalk& walk, int c,
                                              long long& offset) {
  const Position p = walk.position(c);
  bool inside = c < kColCount && (!kRowsAreKeys || c / kPositions < block.rows.heads);
  for (int a = kFirstAxis; a < 3; ++a) {
    const geometry::Axis& axis = block.cell.grid.axis[a];
    inside = inside && p.at[a] < (kRowsAreKeys ? axis.queries : axis.keys);
  }
  if (inside) offset = placed.row(p, kRowsAreKeys ? block.rows.head + c / kPositions : block.rows.kv_head);
  return inside;
}

// A tensor of the columns, and that of the additional tokens.
struct ColumnSource {
  const Rows* tensor;
  Placed placed;
  const Rows* more = nullptr;
  Placed placed_more;
};

template <int kColumns, int kWidth>
__device__ __forceinline__ void load_columns(const ColumnSource& from, const Block& block, const ColWalk& walk,
                                             int additional, int first, Acc* smem) {
  if (!kRowsAreKeys && kAdditional && walk.additional) {
    load_tile<kCols, kColumns, kWidth>(
        from.more->data, first,
        [&](int c, long long& offset) {
          const Position p = {{0, 0, walk.origin.at[2] + c}};
          offset = from.placed_more.row(p, block.rows.kv_head);
          return c < kColCount && p.at[2] < additional;
        },
        smem);
  } else {
    load_tile<kCols, kColumns, kWidth>(
        from.tensor->data, first,
        [&](int c, long long& offset) { return column_offset(from.placed, block, walk, c, offset); }, smem);
  }
}

}  // namespace vicus::gpu
