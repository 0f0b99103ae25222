// The tiles of the backward kernels of sm90: what lies where in shared memory, and what rows see.
//
// A block owns rows (a box of keys, or of queries) and meets columns (boxes of the others) one tile after the other. Of
// rows and columns alike there are the tensors of the first product (query, key) and of the second one (gradient of the
// output, value). Constants of the prologue, besides those of sm90_boxes.cuh, where kTileQ is the box of rows and kTileKv
// that of columns: kOfKeys (rows are keys), kSumsFirst and kSumsSecond (what is summed of the columns of the first product:
// dQ or dK; of the second one: dV), kSecondStages, kAddQueries (keys also sum dQ), kKeyParts (several blocks share out the
// query heads that meet the same keys, and leave sums of their own), kHeadsInside (GpuKernelPlan::heads_inside),
// kSharedBytes.
//
// Where head dims are long, dK and dV have kernels of their own, and the columns of the two products come and go apart:
// kSecondStages of the second one, kStages of the first. Otherwise kSecondStages is 0, and a stage has both.
#pragma once

#include "sm90_boxes.cuh"

namespace vicus::gpu {

constexpr int kColumns = kKeys;
constexpr int kTokenBytes = kSlab * 2;  // of a token, in a slab
// Of a long line few tiles are masked. One kernel for all gradients has no registers left to keep a mask of 128 columns.
constexpr Copies kCopies = kOfKeys && kAddQueries && kColumns > 64 && copies_of_step(false) == Copies::masked
                               ? Copies::asked
                               : copies_of_step(kRank == 1);
constexpr int kStatisticsWarps = kColumns % 96 == 0   ? 3
                                 : kColumns % 64 == 0 ? 2
                                 : kColumns > 64      ? 3
                                 : kColumns > 32      ? 2
                                                      : 1;
constexpr bool kOfQueries = !kOfKeys;
// In a crowd, warp 0 of the math calls the copy engine, the last two warps bring statistics of queries.
constexpr int kCopyWarps = 2, kFirstCopyWarp = 4 - kCopyWarps;
// Arrivals that a stage waits for: of its boxes, and of those who bring statistics of its queries.
constexpr int kStageArrivals = 1 + (kOfQueries ? 0 : 32 * (kCrowd ? kCopyWarps : kStatisticsWarps));
constexpr int kMathThreads = kWarpgroups * kWarpgroupThreads;  // that arrive when they are done with a stage
constexpr bool kSumsBoth = kSumsFirst && kSumsSecond;
constexpr bool kApart = kSecondStages > 0;
static_assert(kOfQueries ? !kSumsSecond : kApart != kSumsBoth);
// A tile is masked whatever it is to the rows; none is seen by none of them.
constexpr bool kAlwaysMasked = kCrowd && kCopies == Copies::masked;
using SecondRing = RingOf<kApart ? kSecondStages : kStages>;
constexpr int kDv = (kHeadDimV + 15) / 16 * 16;
// Blocks of small windows spend a fifth of their instructions on storing rows: their sums leave by the copy engine. Not with
// strides inside of a box, nor where features of the next head follow in a slab.
constexpr bool kStoresBoxes = kCrowd && kDilation[0] == 1 && kDilation[1] == 1 && kDilation[2] == 1 &&
                              (kHeadAxis || (kHeadDim % kSlab == 0 && kHeadDimV % kSlab == 0));
// Columns that follow the last one of a sequence are those of others, or padding.
constexpr bool kOthers = kPacked || (kKeyLengths && kOfQueries);
constexpr int kGradSlabs = (kColumns + kSlab - 1) / kSlab;
// dQ of a tile: a warpgroup sums 64 queries by 64 features of it, half of the queries or half of the features.
constexpr bool kAdds = kOfKeys && kAddQueries;
constexpr int kSumWidth = 64, kSumSlab = 16, kSumSlabs = kWarpgroups * kRows * kSumWidth / (kColumns * kSumSlab);
constexpr bool kHalfQueries = kGradSlabs > 1;
// What rows see along an axis is known by their positions along it; those of the axes before are before them.
static_assert(kBoxRows == kRows);
__device__ __forceinline__ constexpr int seen_before(int axis) {
  int positions = 0;
  for (int a = kFirstAxis; a < axis; ++a) positions += box_extent(a);
  return positions;
}
static_assert(!kAdds || (!kCrowd && kWarpgroups == 2 && kColumns == 128 / kSlabs && kSlabs <= 2 && !kAdditional));

__device__ __forceinline__ int columns_of(const Axis& axis) { return kOfKeys ? axis.queries : axis.keys; }
// Rows that are stored: padded keys, which nobody sees, too.
__device__ __forceinline__ int rows_of(const BackwardArgs& args, const Axis& axis) {
  return kOfQueries ? axis.queries : kKeyLengths ? args.keys : axis.keys;
}

// What is in a stage.
struct ColumnTile {
  KeyWalk walk;
  TileUse use[kWarpgroups];
};

// The rows of a block.
struct RowTile {
  Cell cell;
  QueryTile tile;             // of rows, whatever they are
  int first_head, past_head;  // of queries, that meet rows of keys
  int part;                   // of the heads that share a head of keys: kKeyParts
  bool backwards;             // columns are met from the last to the first
};

constexpr int kRowSlabs = kWarpgroups * (kSlabs + (kSumsFirst ? kValueSlabs : 0));

struct alignas(1024) Smem {
  u16 row_slabs[kRowSlabs][kRows * kSlab];  // row_first and row_second
  u16 first[kStages][kSlabs][kColumns * kSlab];
  u16 second[kApart ? kSecondStages : kStages][kValueSlabs][kColumns * kSlab];
  // Gradients of the logits: rows of keys, by warpgroup; columns of queries, 64 in a slab. Two, so that all warps are done
  // with one before any writes it again; one where barriers see to that.
  u16 grad_scores[kAdds ? 1 : 2][kWarpgroups][kGradSlabs][kSumsBoth && !kCrowd ? kRows * kSlab : 8];
  float sums[kAdds ? kSumSlabs : 1][kAdds ? kColumns * kSumSlab : 4];  // sm90_query_sums.cuh
  // Of the queries of a stage.
  float lse[kStages][kOfKeys ? kColumns : 1], delta[kStages][kOfKeys && kSumsFirst ? kColumns : 1];
  u64 rows_full, full[kStages], empty[kStages], grads_full, grads_empty, sums_full, sums_empty;
  u64 second_full[kApart ? kSecondStages : 1], second_empty[kApart ? kSecondStages : 1];  // kApart
  ColumnTile tile[kStages];
  Box any[kWarpgroups], all[kWarpgroups];  // columns that a warpgroup's rows see
  Span seen[kWarpgroups][seen_before(3)];  // by rows of each position along an axis
  RowTile rows;
  Box met;    // columns that any row of the block sees
  int tiles;  // of columns, of all heads

  // Of a warpgroup: slabs of its rows of the first and, for dQ and dK, of the second product.
  __device__ __forceinline__ u16* row_first(int warpgroup) { return row_slabs[warpgroup * kSlabs]; }
  __device__ __forceinline__ u16* row_second(int warpgroup) {
    return row_slabs[kWarpgroups * kSlabs + warpgroup * kValueSlabs];
  }
};
static_assert(sizeof(Smem) <= kSharedBytes);

// By one thread, those of dQ's sums apart.
__device__ __forceinline__ void init_barriers(Smem& smem) {
  mbarrier_init(smem_address(&smem.rows_full), 1);
  for (int s = 0; s < kStages; ++s) {
    mbarrier_init(smem_address(&smem.full[s]), kStageArrivals);
    mbarrier_init(smem_address(&smem.empty[s]), kMathThreads);
  }
  for (int s = 0; s < kSecondStages; ++s) {
    mbarrier_init(smem_address(&smem.second_full[s]), 1);
    mbarrier_init(smem_address(&smem.second_empty[s]), kWarpgroups * 4);
  }
  fence_mbarrier_init();
}

__device__ __forceinline__ RowTile row_tile(const Sm90BackwardArgs& all) {
  const BackwardArgs& args = all.backward;
  RowTile rows;
  // The longest first: later queries see more keys, earlier keys are seen by more queries.
  const int block = static_cast<int>(blockIdx.x);
  TileIndex index = tile_index<kOfQueries>(args.order, kUneven && !kCrowd ? args.order.nth(block) : block);
  const bool whole = kOfKeys && !kKeyParts;
  rows.tile.kv_head = whole ? index.head_block : args.order.group_blocks.divide(index.head_block);
  rows.tile.head = kOfKeys ? rows.tile.kv_head : index.head_block;
  rows.tile.heads = 1;
  rows.first_head = index.head_block * args.order.group;
  rows.past_head = rows.first_head + args.order.group;
  rows.backwards = kOfKeys && kDense && kUneven && block < args.order.at_once;
  rows.part = index.head_block - rows.tile.kv_head * static_cast<int>(args.order.group_blocks.value);
  CellPlace cell = cell_place(args, index.cell);
  if constexpr (kPacked) {
    const auto [sequence, tile] =
        find_sequence(kOfKeys ? args.cumulative_keys : args.cumulative_queries, kOfKeys ? args.keys : args.len[2],
                      args.sequences, kTileQ[2], index.at[2]);
    cell.sequence = sequence;
    index.at[2] = tile;
  }
  rows.cell = make_cell(args, cell);
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    rows.tile.box.axis[a] = a < kFirstAxis
                                ? Span{0, 1}
                                : geometry::tile_span(index.at[a], kTileQ[a], rows_of(args, rows.cell.grid.axis[a]));
  }
  return rows;
}

__device__ __forceinline__ int column_tiles(const Box& met, int additional) {
  int tiles = 1;
  for (int a = kFirstAxis; a < 3; ++a) tiles *= geometry::ceil_div(geometry::hi(met.axis[a].size(), 0), kTileKv[a]);
  return kAdditional ? tiles + geometry::ceil_div(additional, kColumns) : tiles;
}

// What any of some rows see along an axis, and what all of them see.
__device__ __forceinline__ Span columns_of_any(const Axis& axis, const Span& rows) {
  return kOfKeys ? geometry::queries_of(axis, rows) : geometry::hull(axis, rows);
}
__device__ __forceinline__ Span columns_of_all(const Axis& axis, const Span& rows) {
  return kOfKeys ? geometry::queries_of_all(axis, rows) : geometry::core(axis, rows);
}

// Notes the rows of the block, what any of them sees, and what any or all rows of each warpgroup see. By one thread.
__device__ __forceinline__ void note_columns(const BackwardArgs& args, Smem& smem, const RowTile& rows) {
  smem.rows = rows;
  Box met;
  for (int a = 0; a < 3; ++a) {
    met.axis[a] = a < kFirstAxis ? Span{0, 1} : columns_of_any(rows.cell.grid.axis[a], rows.tile.box.axis[a]);
  }
  smem.met = met;
  // Without rows there is nothing to do; where threads returned instead, those that load spilled.
  smem.tiles =
      rows.tile.box.empty() ? 0 : column_tiles(met, args.additional) * (kOfKeys ? rows.past_head - rows.first_head : 1);
  for (int w = 0; w < kWarpgroups && !kAlwaysMasked; ++w) {
#pragma unroll
    for (int a = kFirstAxis; a < 3; ++a) {
      const Axis& axis = rows.cell.grid.axis[a];
      const int origin = box_origin(rows.tile, w).at[a];
      const Span lines = geometry::intersect({origin, origin + box_extent(a)}, rows.tile.box.axis[a]);
      smem.any[w].axis[a] = columns_of_any(axis, lines);
      // Rows that are none are masked: memory after the last may hold anything.
      smem.all[w].axis[a] = lines.size() == box_extent(a) ? columns_of_all(axis, lines) : Span{0, 0};
    }
  }
}

// Notes what rows see along each axis. By all threads: a warp begins with each axis, the last ones first.
__device__ __forceinline__ void note_seen(Smem& smem, const RowTile& rows) {
  static_assert(kThreads >= kWarpgroups * kRows + 32 * (kRank - 1));
#pragma unroll
  for (int a = kFirstAxis; a < 3; ++a) {
    constexpr int kWarp = 32;
    const int extent = box_extent(a), i = kThreads - 1 - kWarp * (a - kFirstAxis) - static_cast<int>(threadIdx.x);
    if (i < 0 || i >= kWarpgroups * extent) continue;
    const int w = i / extent, line = i % extent, at = box_origin(rows.tile, w).at[a] + line;
    smem.seen[w][seen_before(a) + line] =
        at < rows.tile.box.axis[a].end ? columns_of_any(rows.cell.grid.axis[a], {at, at + 1}) : Span{0, 0};
  }
}

// The walk over the tiles of columns of a block. Blocks of keys that work together are to load, and add to, the same queries at
// the same time, or those do not stay in the second cache: heads of a group take turns at each place. In causal attention those
// that begin together do so with the last queries, which all of them meet. Others begin as blocks of fewer queries end, the
// block of the first keys first: each with its first query is where those before it have come to. Where blocks are many and
// sequences long they lose each other, and one head comes after the other; so of long head dims, as the thread that loads has no
// registers for anything else.
struct ColumnWalk {
  static constexpr bool kByPlaces = kOfKeys && kHeadsInside && !kApart, kMayTurn = kByPlaces && kDense && kUneven;
  KeyWalk walk;
  int head;
  __device__ __forceinline__ void begin(const Smem& smem) {
    const RowTile& rows = smem.rows;
    head = kOfKeys ? rows.first_head : rows.tile.kv_head;
    walk.begin(smem.met);
    if (kMayTurn && rows.backwards) walk.origin.at[2] += (key_tiles_of(smem.met.axis[2], 2) - 1) * kTileKv[2];
  }
  __device__ __forceinline__ void next(const Smem& smem) {
    if constexpr (kByPlaces) {
      if (++head < smem.rows.past_head) return;
      head = smem.rows.first_head;
    }
    if (kMayTurn && smem.rows.backwards) walk.origin.at[2] -= kTileKv[2];
    else walk.next(smem.met);
    if (kOfQueries || kByPlaces || !walk.additional) return;
    walk.additional = false;  // it has begun again
    for (int a = kFirstAxis; a < 3; ++a) walk.origin.at[a] = smem.met.axis[a].begin;
    ++head;
  }
};

}  // namespace vicus::gpu
