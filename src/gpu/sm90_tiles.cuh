// Tiles of the forward kernel of sm90: what lies where in shared memory, and the thread that loads it. Constants of the
// prologue, besides those of sm90_boxes.cuh: kSharedBytes.
#pragma once

#include "sm90_boxes.cuh"

namespace vicus::gpu {

// Which tile of queries: what costs divisions, done once by the thread that loads.
struct TilePlace {
  CellPlace cell;
  int at[3];  // tiles before it along the axes
  int head, kv_head;
};

__device__ __forceinline__ TilePlace place_of(const ForwardArgs& args, int block) {
  TilePlace place;
  for (int a = 2; a >= 0; --a) {
    place.at[a] = 0;
    if (a < kFirstAxis) continue;
    place.at[a] = block % args.work.tiles[a];
    block /= args.work.tiles[a];
    if (kDense || kCausal[a]) place.at[a] = args.work.tiles[a] - 1 - place.at[a];  // the longest first
  }
  QueryTile heads;
  heads.place_heads(args, block % args.work.head_blocks);
  place.head = heads.head;
  place.kv_head = heads.kv_head;
  place.cell = cell_place(args, block / args.work.head_blocks);
  return place;
}

__device__ __forceinline__ QueryTile tile_of(const TilePlace& place, const Cell& cell) {
  QueryTile tile;
  tile.head = place.head;
  tile.kv_head = place.kv_head;
  tile.heads = 1;
  for (int a = 0; a < 3; ++a) {
    tile.box.axis[a] =
        a < kFirstAxis ? Span{0, 1} : geometry::tile_span(place.at[a], kTileQ[a], cell.grid.axis[a].queries);
  }
  return tile;
}

// What a warpgroup has to do for a tile of queries.
struct Job {
  TilePlace place;
  int key_tiles;  // negative: there are no more tiles of queries
};

// What is in `key` and `value` of a stage.
struct KeyTile {
  KeyWalk walk;
  TileUse use[kWarpgroups];
};

struct alignas(1024) Smem {
  u16 query[kWarpgroups][kSlabs][kRows * kSlab];
  u16 key[kStages][kSlabs][kKeys * kSlab];
  u16 value[kStages][kValueSlabs][kKeys * kSlab];
  // Full: the copy engine and the one thread that calls it. Empty: the warps of the math.
  u64 query_full[kWarpgroups], query_empty[kWarpgroups];
  u64 key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
  Job job[kWarpgroups][2];  // the one whose queries are in `query`, and the one before or after
  KeyTile key_tile[kStages];
  Box hull[kWarpgroups], core[kWarpgroups];  // of the queries that are being loaded
  Span seen[kWarpgroups][kRows][kRank];      // keys of each row, per axis
};
static_assert(sizeof(Smem) <= kSharedBytes);

__device__ __forceinline__ void init_barriers(Smem& smem) {
  constexpr int kMathWarps = kWarpgroups * 4;
  for (int w = 0; w < kWarpgroups; ++w) {
    mbarrier_init(smem_address(&smem.query_full[w]), 1);
    mbarrier_init(smem_address(&smem.query_empty[w]), 4);
  }
  for (int s = 0; s < kStages; ++s) {
    mbarrier_init(smem_address(&smem.key_full[s]), 1);
    mbarrier_init(smem_address(&smem.key_empty[s]), kMathWarps);
    mbarrier_init(smem_address(&smem.value_full[s]), 1);
    mbarrier_init(smem_address(&smem.value_empty[s]), kMathWarps);
  }
  fence_mbarrier_init();
}

// Notes what the queries of each warpgroup see, and returns what any of the tile sees.
__device__ __forceinline__ Box note_hulls(Smem& smem, const Cell& cell, const QueryTile& tile) {
  Box all;
  for (int w = 0; w < kWarpgroups; ++w) {
    const Position origin = box_origin(tile, w);
    for (int a = kFirstAxis; a < 3; ++a) {
      const Span rows = geometry::intersect({origin.at[a], origin.at[a] + box_extent(a)}, tile.box.axis[a]);
      smem.hull[w].axis[a] = geometry::hull(cell.grid.axis[a], rows);
      smem.core[w].axis[a] = geometry::core(cell.grid.axis[a], rows);
    }
  }
  for (int a = 0; a < 3; ++a) {
    all.axis[a] = a < kFirstAxis ? Span{0, 1} : geometry::hull(cell.grid.axis[a], tile.box.axis[a]);
  }
  return all;
}

__device__ __forceinline__ int key_tiles_of(const Box& hull, int additional) {
  int tiles = 1;
  for (int a = kFirstAxis; a < 3; ++a) tiles *= geometry::ceil_div(geometry::hi(hull.axis[a].size(), 0), kTileKv[a]);
  return kAdditional ? tiles + geometry::ceil_div(additional, kKeys) : tiles;
}

// Tiles differ in length: in causal attention.
constexpr bool kUneven = kDense && kBandRight >= 0 && kBandLeft < 0;

// The n-th tile that is computed. Uneven ones go by length, the longest first, of so many heads together that a few tiles of
// each are computed at a time and read the same keys.
__device__ __forceinline__ int nth_block(const Sm90Args& args, int n) {
  if (!kUneven) return n;
  const int tiles = args.forward.work.tiles[2], heads = args.blocks / tiles;  // of all cells
  const int together = geometry::hi(static_cast<int>(gridDim.x) / 4, 1);
  const int group = n / (tiles * together), first = group * together, rest = n - first * tiles;
  const int size = geometry::lo(together, heads - first);
  return (first + rest % size) * tiles + rest / size;
}

// The one thread that calls the copy engine. Key tiles run one ahead of value tiles, as the math does.
__device__ __forceinline__ void load(const Sm90Args& args, Smem& smem) {
  constexpr int kTokenBytes = kSlab * 2;
  const ForwardArgs& f = args.forward;
  Ring keys, values;
  u32 parity = 0;  // of tiles of queries
  const auto load_key = [&](const Cell& cell, const QueryTile& tile, const KeyWalk& walk) {
    const u64& full = smem.key_full[keys.stage];
    mbarrier_wait(smem_address(&smem.key_empty[keys.stage]), keys.phase ^ 1);
    KeyTile& note = smem.key_tile[keys.stage];
    note.walk = walk;
    for (int w = 0; w < kWarpgroups; ++w) note.use[w] = use_of(smem.hull[w], smem.core[w], walk, f.additional);
    mbarrier_expect(smem_address(&full), kSlabs * kKeys * kTokenBytes);
    const bool more = kAdditional && walk.additional;
    load_box<kSlabs, kKeys>(more ? args.additional_key : args.key, smem.key[keys.stage][0], full, cell.batch,
                            tile.kv_head, more ? f.additional_keys.head : f.key.head,
                            more ? walk.origin : token_of(cell, walk.origin, cell.first_key));
    keys.next();
  };
  const auto load_value = [&](const Cell& cell, const QueryTile& tile, const KeyWalk& walk) {
    const u64& full = smem.value_full[values.stage];
    mbarrier_wait(smem_address(&smem.value_empty[values.stage]), values.phase ^ 1);
    mbarrier_expect(smem_address(&full), kValueSlabs * kKeys * kTokenBytes);
    const bool more = kAdditional && walk.additional;
    load_box<kValueSlabs, kKeys>(more ? args.additional_value : args.value, smem.value[values.stage][0], full,
                                 cell.batch, tile.kv_head, more ? f.additional_values.head : f.value.head,
                                 more ? walk.origin : token_of(cell, walk.origin, cell.first_key));
    values.next();
  };
  const auto publish = [&](int w, const Job& job) {
    mbarrier_wait(smem_address(&smem.query_empty[w]), parity ^ 1);
    smem.job[w][parity] = job;
  };
  const int grid = static_cast<int>(gridDim.x), first = static_cast<int>(blockIdx.x);
  // Back and forth, so that no block has the longest tile of each round.
  for (int round = 0; round * grid < args.blocks; ++round) {
    const int n = round * grid + (round % 2 == 0 ? first : grid - 1 - first);
    if (n >= args.blocks) continue;
    Job job;
    job.place = place_of(f, nth_block(args, n));
    const Cell cell = make_cell(f, job.place.cell);
    const QueryTile tile = tile_of(job.place, cell);
    if (tile.box.empty()) continue;
    const Box hull = note_hulls(smem, cell, tile);
    job.key_tiles = key_tiles_of(hull, f.additional);
    KeyWalk walk;
    walk.begin(hull);
    if (job.key_tiles > 0) load_key(cell, tile, walk);
    for (int w = 0; w < kWarpgroups; ++w) {
      publish(w, job);
      mbarrier_expect(smem_address(&smem.query_full[w]), kSlabs * kBoxRows * kTokenBytes);
      load_box<kSlabs, kRows>(args.query, smem.query[w][0], smem.query_full[w], cell.batch, tile.head, f.query.head,
                              token_of(cell, box_origin(tile, w), cell.first_query));
    }
    parity ^= 1;
    for (int t = 1; t < job.key_tiles; ++t) {
      const KeyWalk before = walk;
      walk.next(hull);
      load_key(cell, tile, walk);
      load_value(cell, tile, before);
    }
    if (job.key_tiles > 0) load_value(cell, tile, walk);
  }
  for (int w = 0; w < kWarpgroups; ++w) {
    Job none;
    none.key_tiles = -1;
    publish(w, none);
    mbarrier_arrive(smem_address(&smem.query_full[w]));
  }
}

}  // namespace vicus::gpu
