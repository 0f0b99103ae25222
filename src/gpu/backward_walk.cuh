// What a block of keys holds in shared memory; the tiles of queries that it meets, their order, and what of them goes there.
//
// Constants of the prologue: those of backward.cuh, kAddQueries.
#pragma once

#include "backward.cuh"

namespace vicus::gpu {

constexpr int kStep = kChunk * kSplits;
constexpr int kQueryRows = kGathers ? kPositions : geometry::ceil_div(kMetColumns, kStep) * kStep;
constexpr int kAllRows = kQueryRows + kSpareRows;
constexpr int kPartQ = kDq / kSplits, kPartV = kDv / kSplits;  // features that a warp sums

constexpr int kExchanged = kSplits > 1 ? 2 * (kChunk / 16) * kRowBlocks * 4 : 0;  // registers
constexpr int kWeightStride = kQueryRows + 8;
enum Use { kSkip, kPlain, kCareful };

static_assert(kOwnsKeys && kDq % (16 * kSplits) == 0 && kDv % (16 * kSplits) == 0 && !(kGathers && kAddQueries));

// The keys of a block: a box of the cell, or additional tokens.
struct KeyTile {
  Position origin;
  int kv_head;
  bool backwards;  // queries are met from the last to the first
};

// In causal attention blocks that begin together begin with the last queries, which all of them meet: sm90_gradients.cuh.
constexpr bool kMayTurn = kDense && kUneven && !kAdditionalTile;

// What all threads of a block share about its keys, worked out by one of them.
struct KeyBlock {
  KeyTile tile;
  Cell cell;
  int first_cell, last_cell;
  Box keys, stored;  // to load, and to store: padding has zero gradients
  Placed key, value, grad_key, grad_value;

  __device__ __forceinline__ void prepare(const BackwardArgs& args) {
    const int number = static_cast<int>(blockIdx.x);
    const TileIndex index =
        tile_index<false>(args.order, kUneven && !kAdditionalTile ? args.order.nth(number) : number);
    for (int a = 0; a < 3; ++a) tile.origin.at[a] = index.at[a] * kOwnTile.at[a];
    tile.kv_head = index.head_block;
    tile.backwards = kMayTurn && number < args.order.at_once;
    const int block = index.cell;
    first_cell = block;
    last_cell = block + 1;
    const auto tile_before = [&](int a, int end) {
      return Span{tile.origin.at[a], geometry::lo(tile.origin.at[a] + kOwnTile.at[a], end)};
    };
    for (int a = 0; a < 3; ++a) keys.axis[a] = stored.axis[a] = {0, 1};
    if constexpr (kAdditionalTile) {  // block: a batch entry
      cell.batch = block;
      const int classes = kDense ? 1 : args.work.classes[0] * args.work.classes[1] * args.work.classes[2];
      first_cell = kPacked ? 0 : block * classes;
      last_cell = kPacked ? args.sequences : first_cell + classes;
      keys.axis[2] = stored.axis[2] = tile_before(2, args.additional);
      key = place_additional(args.additional_keys, cell);
      value = place_additional(args.additional_values, cell);
      grad_key = place_additional(args.grad_additional_keys, cell);
      grad_value = place_additional(args.grad_additional_values, cell);
    } else {
      cell = make_cell(args, block);
      for (int a = kFirstAxis; a < 3; ++a) {
        keys.axis[a] = tile_before(a, cell.grid.axis[a].keys);
        stored.axis[a] = kKeyLengths ? tile_before(a, args.keys) : keys.axis[a];
      }
      key = place(args.key, cell, cell.first_key);
      value = place(args.value, cell, cell.first_key);
      grad_key = place(args.grad_key, cell, cell.first_key);
      grad_value = place(args.grad_value, cell, cell.first_key);
    }
  }
};

// Where the walk over tiles of queries stands; lies in shared memory, for its many fields are the same for all threads.
// The heads of the group at each box of kTileQ over the queries that see the keys, row-major; then the next cell.
struct QueryWalk {
  Cell cell;
  int index, last;  // cells
  Box hull;
  QueryTile tile;
  bool done, backwards;

  // `seen`: the box of queries that see the keys, in the only cell but where keys are additional tokens.
  __device__ __forceinline__ void begin(const BackwardArgs& args, const KeyTile& keys, const Cell& first,
                                        const Box& seen, int first_cell, int last_cell) {
    index = first_cell;
    last = last_cell;
    tile.kv_head = keys.kv_head;
    backwards = keys.backwards;
    if constexpr (kAdditionalTile) {
      find_cell(args);
    } else {
      cell = first;
      hull = seen;
      done = hull.empty();
      if (!done) begin_hull(args);
    }
  }
  __device__ __forceinline__ void next(const BackwardArgs& args) {
    if (done) return;
    if (args.order.group > kTileHeads) {
      const int head = tile.head + kTileHeads, first_head = tile.kv_head * args.order.group;
      if (head < first_head + args.order.group) return start_heads(args, head);
      start_heads(args, first_head);
    }
#pragma unroll
    for (int a = 2; a >= kFirstAxis; --a) {
      const int step = kMayTurn && backwards ? -kTileQ[a] : kTileQ[a], begin = tile.box.axis[a].begin + step;
      if (begin < hull.axis[a].end && (!kMayTurn || begin >= hull.axis[a].begin)) return start_axis(a, begin);
      start_axis(a, first_of(a));
    }
    ++index;
    if constexpr (kAdditionalTile) {
      find_cell(args);
    } else {
      done = true;
    }
  }

 private:
  __device__ __forceinline__ void start_axis(int a, int begin) {
    tile.box.axis[a] = {begin, geometry::lo(begin + kTileQ[a], hull.axis[a].end)};
  }
  __device__ __forceinline__ void start_heads(const BackwardArgs& args, int head) {
    tile.head = head;
    tile.heads = geometry::lo(kTileHeads, (tile.kv_head + 1) * args.order.group - head);
  }
  __device__ __forceinline__ int first_of(int a) const {
    const Span& all = hull.axis[a];
    return kMayTurn && backwards ? all.begin + (all.size() - 1) / kTileQ[a] * kTileQ[a] : all.begin;
  }
  // From cell `index` on, the first with queries.
  __device__ __forceinline__ void find_cell(const BackwardArgs& args) {
    for (done = true; done && index < last; index += done) {
      cell = make_cell(args, index);
      for (int a = 0; a < 3; ++a) hull.axis[a] = {0, a < kFirstAxis ? 1 : cell.grid.axis[a].queries};
      done = hull.empty();
    }
    if (!done) begin_hull(args);
  }
  __device__ __forceinline__ void begin_hull(const BackwardArgs& args) {
    start_heads(args, tile.kv_head * args.order.group);
    tile.box.axis[0] = tile.box.axis[1] = {0, 1};
    for (int a = kFirstAxis; a < 3; ++a) start_axis(a, first_of(a));
  }
};

// Rows of the tile's queries and of their gradients of the output, `kCount` of them.
template <int kCount>
__device__ __forceinline__ void load_query_tile(const BackwardArgs& args, const QueryWalk& walk, u16* queries,
                                                u16* grads) {
  const Cell& cell = walk.cell;
  const Placed query = place(args.query, cell, cell.first_query);
  const Placed grad_output = place(args.grad_output, cell, cell.first_query);
  if constexpr (kTileHeads == 1 && kCount == kPositions) {
    const Box& box = walk.tile.box;
    const Position origin = {{box.axis[0].begin, box.axis[1].begin, box.axis[2].begin}};
    const int limit[3] = {box.axis[0].end, box.axis[1].end, box.axis[2].end};
    const Load of_queries = {args.query, query, queries};
    const Load of_grads = {args.grad_output, grad_output, grads};
    constexpr int kExtent1 = kTileQ[1], kExtent2 = kTileQ[2];
    if constexpr (kHeadDim == kHeadDimV) {
      load_box<kCount, kExtent1, kExtent2, kHeadDim, kThreads, 2>({of_queries, of_grads}, walk.tile.head, origin,
                                                                  limit);
    } else {
      load_box<kCount, kExtent1, kExtent2, kHeadDim, kThreads, 1>({of_queries}, walk.tile.head, origin, limit);
      load_box<kCount, kExtent1, kExtent2, kHeadDimV, kThreads, 1>({of_grads}, walk.tile.head, origin, limit);
    }
  } else {
    load_query_rows<kCount, kHeadDim, kThreads>(args.query, query, walk.tile, queries);
    load_query_rows<kCount, kHeadDimV, kThreads>(args.grad_output, grad_output, walk.tile, grads);
  }
}

struct Smem {
  u16 query[kStages][kAllRows * kQStride];
  u16 grad_output[kStages][kAllRows * kVStride];
  u16 key[kGathers ? 8 : kRows * kQStride];
  u16 value[kGathers ? 8 : kRows * kVStride];
  __align__(16) u16 grad_scores[kAddQueries ? kRows * kWeightStride : 8];  // dS, a row for each key
  Statistics statistics[kStages][kAllRows];
  u32 weights[2][kSplits > 1 ? kWarps : 1][kExchanged > 0 ? kExchanged : 1][32];
  int use[2][kWarps];
  Windows windows;
  QueryWalk walk[kStages + 1];  // of the tile that is multiplied, those that are loaded, and one more
  KeyBlock block;
};
static_assert(sizeof(Smem) <= kSharedBytes);

// Where key row `row` of the tile lies; whether it is in `box`.
__device__ __forceinline__ bool key_row(const KeyBlock& block, const Box& box, int row, Position& p) {
  p = own_position(row);
  bool inside = kRows == kOwnRows || row < kOwnRows;
  for (int a = 0; a < 3; ++a) {
    p.at[a] += block.tile.origin.at[a];
    inside = inside && (a < kFirstAxis || p.at[a] < box.axis[a].end);
  }
  return inside;
}

}  // namespace vicus::gpu
