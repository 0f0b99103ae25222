// The tiles of the backward kernels of sm90: what lies where in shared memory, and the warp that loads it.
//
// A block owns rows (a box of keys, or of queries) and meets columns (boxes of the others) one tile after the other. Of
// rows and columns alike there are the tensors of the first product (query, key) and of the second one (gradient of the
// output, value). Constants of the prologue, besides those of sm90_boxes.cuh, where kTileQ is the box of rows and kTileKv
// that of columns: kOfKeys (rows are keys), kSumsFirst and kSumsSecond (what is summed of the columns of the first product:
// dQ or dK; of the second one: dV), kSecondStages, kAddQueries (keys also sum dQ), kSharedBytes.
//
// Where head dims are long, dK and dV have kernels of their own, and the columns of the two products come and go apart:
// kSecondStages of the second one, kStages of the first. Otherwise kSecondStages is 0, and a stage has both.
#pragma once

#include "sm90_boxes.cuh"

namespace vicus::gpu {

constexpr int kColumns = kKeys;
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
constexpr bool kSumsBoth = kSumsFirst && kSumsSecond;
constexpr bool kApart = kSecondStages > 0;
static_assert(kOfQueries ? !kSumsSecond : kApart != kSumsBoth);
using SecondRing = RingOf<kApart ? kSecondStages : kStages>;
constexpr int kDv = (kHeadDimV + 15) / 16 * 16;
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
static_assert(!kAdds || (kWarpgroups == 2 && kColumns == 128 / kSlabs && kSlabs <= 2 && !kAdditional));

__device__ __forceinline__ int columns_of(const Axis& axis) { return kOfKeys ? axis.queries : axis.keys; }
// The columns that a row sees.
__device__ __forceinline__ Span columns_of_row(const Axis& axis, int row) {
  return kOfKeys ? geometry::queries_of(axis, {row, row + 1}) : geometry::window(axis, row);
}
// Those that any of the rows sees, or that all see: what a row sees begins and ends no earlier than what the one before sees.
__device__ __forceinline__ Span columns_of_rows(const Axis& axis, Span rows, bool of_all) {
  if (rows.empty()) return {0, 0};
  Span span = {0, columns_of(axis)};
#pragma unroll 1
  for (int end = 0; end < 2; ++end) {
    const Span one = columns_of_row(axis, (end == 0) == of_all ? rows.end - 1 : rows.begin);
    if (end == 0) span.begin = one.begin;
    else span.end = one.end;
  }
  return {span.begin, geometry::hi(span.begin, span.end)};
}
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
  QueryTile tile;  // of rows, whatever they are
  int group;       // heads that share a head of keys
};

constexpr int kRowSlabs = kWarpgroups * (kSlabs + (kSumsFirst ? kValueSlabs : 0));

struct alignas(1024) Smem {
  u16 row_slabs[kRowSlabs][kRows * kSlab];  // row_first and row_second
  u16 first[kStages][kSlabs][kColumns * kSlab];
  u16 second[kApart ? kSecondStages : kStages][kValueSlabs][kColumns * kSlab];
  // Gradients of the logits: rows of keys, by warpgroup; columns of queries, 64 in a slab. Two, so that all warps are done
  // with one before any writes it again; one where barriers see to that.
  u16 grad_scores[kAdds ? 1 : 2][kWarpgroups][kGradSlabs][kSumsBoth ? kRows * kSlab : 8];
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
  __device__ __forceinline__ const u16* row_first(int warpgroup) const { return row_slabs[warpgroup * kSlabs]; }
  __device__ __forceinline__ const u16* row_second(int warpgroup) const {
    return row_slabs[kWarpgroups * kSlabs + warpgroup * kValueSlabs];
  }
};
static_assert(sizeof(Smem) <= kSharedBytes);

__device__ __forceinline__ RowTile row_tile(const Sm90BackwardArgs& all) {
  const BackwardArgs& args = all.backward;
  RowTile rows;
  int block = static_cast<int>(blockIdx.x), at[3] = {0, 0, 0};
#pragma unroll
  for (int a = 2; a >= kFirstAxis; --a) {
    const int tiles = kPacked ? all.places : args.work.tiles[a];
    at[a] = block % tiles;
    block /= tiles;
    // The longest first: later queries see more keys, earlier keys are seen by more queries.
    if (kOfQueries && (kDense || kCausal[a])) at[a] = tiles - 1 - at[a];
  }
  const int heads = kOfKeys ? args.heads_kv : args.heads;
  rows.group = args.heads / args.heads_kv;
  rows.tile.head = block % heads;
  rows.tile.heads = 1;
  rows.tile.kv_head = kOfKeys ? rows.tile.head : rows.tile.head / rows.group;
  CellPlace cell = cell_place(args, block / heads);
  if constexpr (kPacked) {
    const auto [sequence, tile] = find_sequence(kOfKeys ? args.cumulative_keys : args.cumulative_queries,
                                                kOfKeys ? args.keys : args.len[2], args.sequences, kTileQ[2], at[2]);
    cell.sequence = sequence;
    at[2] = tile;
  }
  rows.cell = make_cell(args, cell);
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    rows.tile.box.axis[a] =
        a < kFirstAxis ? Span{0, 1} : geometry::tile_span(at[a], kTileQ[a], rows_of(args, rows.cell.grid.axis[a]));
  }
  return rows;
}

// Notes what rows see: those of each warpgroup, and any of the block. By one warp, for what a span of keys is seen by takes
// long to find: a lane for each span.
__device__ __forceinline__ void note_columns(Smem& smem) {
  constexpr int kSpans = (1 + 2 * kWarpgroups) * kRank;
  static_assert(kSpans <= 32);
  const RowTile& rows = smem.rows;
  const int lane = static_cast<int>(threadIdx.x);
  const int a = kFirstAxis + lane % kRank, which = lane / kRank - 1, w = which / 2;  // which: -1, of the block
  if (lane < kSpans) {
    Axis axis = rows.cell.grid.axis[a];
    if constexpr (kRank == 1) axis = axis_of(rows.cell, 2);
    else axis.band = false;
    const Span block = rows.tile.box.axis[a];
    const int extent = a == 2 ? box_extent(2) : a == 1 ? box_extent(1) : box_extent(0);
    const int begin = block.begin + (a == kStackAxis ? w * extent : 0);
    const Span box = {begin, begin + extent}, mine = geometry::intersect(box, block);
    const bool of_all = which >= 0 && which % 2 == 1;
    Span columns = columns_of_rows(axis, which < 0 ? block : mine, of_all);
    // Rows that are none are masked: memory after the last may hold anything.
    if (of_all && (mine != box || kBoxRows != kRows)) columns = {0, 0};
    if (which < 0) smem.met.axis[a] = columns;
    else (of_all ? smem.all : smem.any)[w].axis[a] = columns;
  } else if (kRank < 3 && lane == 31) {
    for (int other = 0; other < kFirstAxis; ++other) smem.met.axis[other] = {0, 1};
  }
  __syncwarp();
}

__device__ __forceinline__ int column_tiles(const Box& met, int additional) {
  int tiles = 1;
  for (int a = kFirstAxis; a < 3; ++a) tiles *= geometry::ceil_div(geometry::hi(met.axis[a].size(), 0), kTileKv[a]);
  return kAdditional ? tiles + geometry::ceil_div(additional, kColumns) : tiles;
}

// The walk over the tiles of columns of a block: of all heads.
struct ColumnWalk {
  KeyWalk walk;
  int head;
  __device__ __forceinline__ explicit ColumnWalk(const Smem& smem) {
    const QueryTile& rows = smem.rows.tile;
    head = kOfKeys ? rows.head * smem.rows.group : rows.kv_head;
    walk.begin(smem.met);
  }
  __device__ __forceinline__ void next(const Smem& smem) {
    walk.next(smem.met);
    if (kOfQueries || !walk.additional) return;
    walk.additional = false;  // it has begun again
    for (int a = kFirstAxis; a < 3; ++a) walk.origin.at[a] = smem.met.axis[a].begin;
    ++head;
  }
};

// Statistics of the queries of each tile, read a tile ahead. Queries that are none have no weight.
__device__ __forceinline__ void load_statistics(const BackwardArgs& args, Smem& smem) {
  constexpr int kOfThread = (kColumns + 32 * kStatisticsWarps - 1) / (32 * kStatisticsWarps);
  constexpr bool kEven = kColumns % (32 * kStatisticsWarps) == 0;
  mbarrier_wait(smem_address(&smem.rows_full), 0);
  const Cell& cell = smem.rows.cell;
  // Statistics are two floats of each query and head, contiguous: queries and heads are counted, in an int.
  const auto step = [&](long long of_floats) { return static_cast<int>(of_floats / 2); };
  const auto column_of = [](int i) { return static_cast<int>(threadIdx.x) - 32 + 32 * kStatisticsWarps * i; };
  float2 of[kOfThread];
  const auto fetch = [&](const ColumnWalk& at) {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const Position q = key_position(at.walk.origin, column_of(i));
      const Position token = token_of(cell, q, cell.first_query);
      int row = cell.batch * step(args.statistics.batch) + at.head * step(args.statistics.head);
      bool exists = kEven || column_of(i) < kColumns;
#pragma unroll
      for (int a = kFirstAxis; a < 3; ++a) {
        exists = exists && q.at[a] < cell.grid.axis[a].queries;
        row += token.at[a] * step(args.statistics.token[a]);
      }
      of[i] = {1.0f / 0.0f, 0.0f};
      if (exists) of[i] = static_cast<const float2*>(args.statistics.data)[row];
    }
  };
  Ring ring;
  ColumnWalk at(smem);
  int left = smem.tiles;
  if (left > 0) fetch(at);
  while (left > 0) {
    mbarrier_wait(smem_address(&smem.empty[ring.stage]), ring.phase ^ 1);
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const int c = column_of(i);
      if (!kEven && c >= kColumns) continue;
      smem.lse[ring.stage][c] = of[i].x;
      if constexpr (kSumsFirst) smem.delta[ring.stage][c] = of[i].y;
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&smem.full[ring.stage]));
    at.next(smem);
    ring.next();
    if (--left > 0) fetch(at);
  }
}

// One warp, whose first lane calls the copy engine.
__device__ __forceinline__ void load(const Sm90BackwardArgs& args, Smem& smem) {
  constexpr int kTokenBytes = kSlab * 2;
  const BackwardArgs& b = args.backward;
  const RowTile& rows = smem.rows;
  const Cell& cell = rows.cell;
  if (threadIdx.x != 0) return;
  smem.tiles = column_tiles(smem.met, b.additional) * (kOfKeys ? rows.group : 1);
  const int first_row = kOfKeys ? cell.first_key : cell.first_query;
  const int first_column = kOfKeys ? cell.first_query : cell.first_key;
  const Rows &row_first = kOfKeys ? b.key : b.query, &row_second = kOfKeys ? b.value : b.grad_output;
  const Rows &first = kOfKeys ? b.query : b.key, &second = kOfKeys ? b.grad_output : b.value;
  mbarrier_expect(smem_address(&smem.rows_full), kRowSlabs * kBoxRows * kTokenBytes);
  for (int w = 0; w < kWarpgroups; ++w) {
    const Position token = token_of(cell, box_origin(rows.tile, w), first_row);
    load_box<kSlabs, kRows>(args.row_first, smem.row_first(w), smem.rows_full, cell.batch, rows.tile.head,
                            row_first.head, token);
    if constexpr (kSumsFirst) {
      load_box<kValueSlabs, kRows>(args.row_second, smem.row_second(w), smem.rows_full, cell.batch, rows.tile.head,
                                   row_second.head, token);
    }
  }
  Ring ring;
  SecondRing second_ring;
  ColumnWalk at(smem);
  for (int t = smem.tiles; t > 0; --t) {
    const u64& full = smem.full[ring.stage];
    mbarrier_wait(smem_address(&smem.empty[ring.stage]), ring.phase ^ 1);
    ColumnTile& note = smem.tile[ring.stage];
    note.walk = at.walk;
    for (int w = 0; w < kWarpgroups; ++w) note.use[w] = use_of(smem.any[w], smem.all[w], at.walk, b.additional);
    mbarrier_expect(smem_address(&full), (kSlabs + (kApart ? 0 : kValueSlabs)) * kColumns * kTokenBytes);
    const bool more = kAdditional && at.walk.additional;
    const Position token = more ? at.walk.origin : token_of(cell, at.walk.origin, first_column);
    load_box<kSlabs, kColumns>(more ? args.additional_first : args.first, smem.first[ring.stage][0], full, cell.batch,
                               at.head, more ? b.additional_keys.head : first.head, token);
    const int stage = kApart ? second_ring.stage : ring.stage;
    const u64& second_full = kApart ? smem.second_full[stage] : full;
    if constexpr (kApart) {
      mbarrier_wait(smem_address(&smem.second_empty[stage]), second_ring.phase ^ 1);
      mbarrier_expect(smem_address(&second_full), kValueSlabs * kColumns * kTokenBytes);
      second_ring.next();
    }
    load_box<kValueSlabs, kColumns>(more ? args.additional_second : args.second, smem.second[stage][0], second_full,
                                    cell.batch, at.head, more ? b.additional_values.head : second.head, token);
    at.next(smem);
    ring.next();
  }
}

}  // namespace vicus::gpu
