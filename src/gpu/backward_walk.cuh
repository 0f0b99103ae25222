// The tiles of queries that a block of keys meets: their order, and what of them goes to shared memory.
#pragma once

#include "backward.cuh"

namespace vicus::gpu {

// The keys of a block: a box of the cell, or additional tokens.
struct KeyTile {
  Position origin;
  int kv_head;
};

// Where the walk over tiles of queries stands; lies in shared memory, for its many fields are the same for all threads.
// Boxes of kTileQ over the queries that see the keys, row-major; then the next heads of the group; then the next cell.
struct QueryWalk {
  Cell cell;
  int index, last;  // cells
  Box hull;
  QueryTile tile;
  bool done;

  __device__ __forceinline__ void begin(const BackwardArgs& args, const KeyTile& keys, int first_cell, int last_cell) {
    index = first_cell;
    last = last_cell;
    tile.kv_head = keys.kv_head;
    find_cell(args, keys);
  }
  __device__ __forceinline__ void next(const BackwardArgs& args, const KeyTile& keys) {
    if (done) return;
#pragma unroll
    for (int a = 2; a >= kFirstAxis; --a) {
      const int begin = tile.box.axis[a].begin + kTileQ[a];
      if (begin < hull.axis[a].end) return start_axis(a, begin);
      start_axis(a, hull.axis[a].begin);
    }
    const int group = args.heads / args.heads_kv;
    tile.head += kTileHeads;
    tile.heads = geometry::lo(kTileHeads, (tile.kv_head + 1) * group - tile.head);
    if (tile.heads > 0) return;
    ++index;
    if constexpr (kAdditionalTile) {
      find_cell(args, keys);
    } else {
      done = true;
    }
  }

 private:
  __device__ __forceinline__ void start_axis(int a, int begin) {
    tile.box.axis[a] = {begin, geometry::lo(begin + kTileQ[a], hull.axis[a].end)};
  }
  // From cell `index` on, the first with queries for these keys.
  __device__ __forceinline__ void find_cell(const BackwardArgs& args, const KeyTile& keys) {
    for (done = true; done && index < last; index += done) {
      cell = make_cell(args, index);
#pragma unroll
      for (int a = 0; a < 3; ++a) {
        if (a < kFirstAxis) {
          hull.axis[a] = {0, 1};
        } else if (kAdditionalTile) {
          hull.axis[a] = {0, cell.grid.axis[a].queries};
        } else {
          const int begin = keys.origin.at[a];
          hull.axis[a] = geometry::queries_of(cell.grid.axis[a],
                                              {begin, geometry::lo(begin + kTileKv[a], cell.grid.axis[a].keys)});
        }
      }
      done = hull.empty();
    }
    if (done) return;
    const int group = args.heads / args.heads_kv;
    tile.head = tile.kv_head * group;
    tile.heads = geometry::lo(kTileHeads, group);
    tile.box.axis[0] = tile.box.axis[1] = {0, 1};
    for (int a = kFirstAxis; a < 3; ++a) start_axis(a, hull.axis[a].begin);
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
      load_box<kCount, kExtent1, kExtent2, kHeadDim, kQStride, kThreads, 2>({of_queries, of_grads}, walk.tile.head,
                                                                            origin, limit);
    } else {
      load_box<kCount, kExtent1, kExtent2, kHeadDim, kQStride, kThreads, 1>({of_queries}, walk.tile.head, origin,
                                                                            limit);
      load_box<kCount, kExtent1, kExtent2, kHeadDimV, kVStride, kThreads, 1>({of_grads}, walk.tile.head, origin, limit);
    }
  } else {
    load_query_rows<kCount, kHeadDim, kQStride, kThreads>(args.query, query, walk.tile, queries);
    load_query_rows<kCount, kHeadDimV, kVStride, kThreads>(args.grad_output, grad_output, walk.tile, grads);
  }
}

// Keys of the tile that a query sees; `kWords` cover all rows of the block.
template <int kWords>
__device__ __forceinline__ void mask_keys(const BackwardArgs& args, const QueryWalk& walk, const KeyTile& keys, int row,
                                          u64 (&mask)[kWords]) {
  const Position p = row_position(walk.tile, row);
  const bool exists = row_exists(walk.tile, row, p);
  if constexpr (kAdditionalTile) {
    const int end = exists ? geometry::lo(args.additional - keys.origin.at[2], kKeys) : 0;
    for (int w = 0; w < kWords; ++w) mask[w] = bits_between(0, end - 64 * w);
  } else {
    Span seen[3];
    for (int a = kFirstAxis; a < 3; ++a) {
      seen[a] = exists ? geometry::window(walk.cell.grid.axis[a], p.at[a]) : Span{0, 0};
      seen[a].end = geometry::lo(seen[a].end, keys.origin.at[a] + kTileKv[a]);
    }
    const KeyMask bits = key_mask(seen, keys.origin);
    for (int w = 0; w < kWords; ++w) mask[w] = w < kMaskWords ? bits.word[w < kMaskWords ? w : 0] : 0;
  }
}

}  // namespace vicus::gpu
