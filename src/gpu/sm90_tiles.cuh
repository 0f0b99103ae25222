// Tiles of the forward kernel of sm90: what lies where in shared memory, and the thread that loads it. Constants of the
// prologue, besides those of sm90_boxes.cuh: kKeyParts (several blocks share out the key tiles of a query tile), kSharedBytes.
#pragma once

#include "sm90_boxes.cuh"

namespace vicus::gpu {

constexpr bool kRagged = kPacked || kKeyLengths;  // rows that follow the last key of a sequence are those of others
// Every query sees every key of its sequence: what a tile hides, it hides from all rows.
constexpr bool kAllSeen = kDense && kBandLeft < 0 && kBandRight < 0;

constexpr Copies kCopies = copies_of_step(kDense);

// Which tile of queries: what costs divisions, done once by the thread that loads.
struct TilePlace {
  CellPlace cell;
  int at[3];  // tiles before it along the axes
  int head, heads, kv_head;
};

__device__ __forceinline__ TilePlace place_of(const Sm90Args& all, int block) {
  const ForwardArgs& args = all.forward;
  const TileIndex tile = tile_index<true>(args.order, block);
  TilePlace place;
  for (int a = 0; a < 3; ++a) place.at[a] = tile.at[a];
  place.kv_head = args.order.group_blocks.divide(tile.head_block);
  const int first = (tile.head_block - place.kv_head * static_cast<int>(args.order.group_blocks.value)) * kTileHeads;
  place.head = kTileHeads == 1 ? tile.head_block : place.kv_head * args.order.group + first;
  place.heads = kTileHeads == 1 ? 1 : geometry::lo(kTileHeads, args.order.group - first);
  place.cell = cell_place(args, tile.cell);
  if (kPacked && kUneven && all.places > 0) {
    const auto [sequence, of_sequence] =
        find_sequence(args.cumulative_queries, args.len[2], all.sequences, kTileQ[2], tile.at[2]);
    place.cell.sequence = sequence;
    place.at[2] = of_sequence;
  }
  return place;
}

__device__ __forceinline__ QueryTile tile_of(const TilePlace& place, const Cell& cell) {
  QueryTile tile;
  tile.head = place.head;
  tile.kv_head = place.kv_head;
  tile.heads = place.heads;
  for (int a = 0; a < 3; ++a) {
    tile.box.axis[a] =
        a < kFirstAxis ? Span{0, 1} : geometry::tile_span(place.at[a], kTileQ[a], cell.grid.axis[a].queries);
  }
  return tile;
}

// What a warpgroup has to do for a tile of queries.
struct Job {
  TilePlace place;
  int key_tiles;             // negative: there are no more tiles of queries
  int part, first_key_tile;  // with kKeyParts: which part of the keys, and where it begins
};

// What is in `key` and `value` of a stage.
struct KeyTile {
  KeyWalk walk;
  int present;  // rows that are keys of the sequence or additional ones, where kRagged or kAllSeen
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
  Box hull[kWarpgroups], core[kWarpgroups];  // of the queries that are being loaded; in a crowd, of the block's
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

// What any query of a tile sees.
__device__ __forceinline__ Box hull_of(const Cell& cell, const QueryTile& tile) {
  Box hull;
  for (int a = 0; a < 3; ++a) {
    hull.axis[a] = a < kFirstAxis ? Span{0, 1} : geometry::hull(cell.grid.axis[a], tile.box.axis[a]);
  }
  return hull;
}

// Notes what the queries of each warpgroup see, and returns what any of the tile sees.
__device__ __forceinline__ Box note_hulls(Smem& smem, const Cell& cell, const QueryTile& tile) {
  for (int w = 0; w < kWarpgroups; ++w) {
    const Position origin = box_origin(tile, w);
    for (int a = kFirstAxis; a < 3; ++a) {
      const Span rows = geometry::intersect({origin.at[a], origin.at[a] + box_extent(a)}, tile.box.axis[a]);
      smem.hull[w].axis[a] = geometry::hull(cell.grid.axis[a], rows);
      smem.core[w].axis[a] = geometry::core(cell.grid.axis[a], rows);
    }
  }
  return hull_of(cell, tile);
}

// Part `part` of `parts` of the key tiles of a job, in the order of the walk: as many in each, but for one. A part may lie
// outside of some windows, and hold no tile where a hull has few.
__device__ __forceinline__ void take_part(Job& job, int part, int parts) {
  const int each = job.key_tiles / parts, more = job.key_tiles % parts;
  job.part = part;
  job.first_key_tile = part * each + geometry::lo(part, more);
  job.key_tiles = each + (part < more);
}

// The keys or values of a tile, and the additional ones.
template <int kBoxSlabs>
__device__ __forceinline__ void load_keys(const TensorMap& map, const TensorMap& additional_map, const u16* to,
                                          const u64& barrier, const Cell& cell, int kv_head, const Rows& rows,
                                          const Rows& additional, const KeyWalk& walk) {
  constexpr int kPieces = kRank == 1 ? pieces_of(kKeys, kDilation[2]) : 1, kPiece = kKeys / kPieces;
  const bool more = kAdditional && walk.additional;
  load_box<kBoxSlabs, kKeys, kPieces, kPiece, kPiece>(
      more ? additional_map : map, to, barrier, cell.batch, kv_head, more ? additional.head : rows.head,
      more ? walk.origin : token_of(cell, walk.origin, cell.first_key), more ? 1 : kDilation[2]);
}

__device__ __forceinline__ int additional_tiles(const ForwardArgs& args) {
  return kAdditional ? geometry::ceil_div(args.additional, kKeys) : 0;
}

constexpr int kTokenBytes = kSlab * 2;

__device__ __forceinline__ void load_key(const Sm90Args& args, Smem& smem, const Cell& cell, int kv_head,
                                         const KeyWalk& walk, Ring& keys) {
  const u64& full = smem.key_full[keys.stage];
  mbarrier_wait(smem_address(&smem.key_empty[keys.stage]), keys.phase ^ 1);
  KeyTile& note = smem.key_tile[keys.stage];
  note.walk = walk;
  if constexpr (kRagged || kAllSeen) {
    const int keys = kAdditional && walk.additional ? args.forward.additional : cell.grid.axis[2].keys;
    note.present = geometry::lo(keys - walk.origin.at[2], kKeys);
  }
  for (int w = 0; w < kWarpgroups && !kCrowd; ++w) {
    note.use[w] = use_of(smem.hull[w], smem.core[w], walk, args.forward.additional);
  }
  mbarrier_expect(smem_address(&full), kSlabs * kKeys * kTokenBytes);
  load_keys<kSlabs>(args.key, args.additional_key, smem.key[keys.stage][0], full, cell, kv_head, args.forward.key,
                    args.forward.additional_keys, walk);
  keys.next();
}

__device__ __forceinline__ void load_value(const Sm90Args& args, Smem& smem, const Cell& cell, int kv_head,
                                           const KeyWalk& walk, Ring& values) {
  const u64& full = smem.value_full[values.stage];
  mbarrier_wait(smem_address(&smem.value_empty[values.stage]), values.phase ^ 1);
  mbarrier_expect(smem_address(&full), kValueSlabs * kKeys * kTokenBytes);
  load_keys<kValueSlabs>(args.value, args.additional_value, smem.value[values.stage][0], full, cell, kv_head,
                         args.forward.value, args.forward.additional_values, walk);
  values.next();
}

// The box of queries of a warpgroup.
__device__ __forceinline__ void load_query(const Sm90Args& args, Smem& smem, const Cell& cell, const QueryTile& tile,
                                           int warpgroup) {
  constexpr int kLine = box_extent(2), kPieces = kRank == 1 ? pieces_of(kLine, kDilation[2]) : 1,
                kPiece = kLine / kPieces;
  const u64& full = smem.query_full[warpgroup];
  mbarrier_expect(smem_address(&full), kSlabs * kBoxRows * kTokenBytes);
  load_box<kSlabs, kRows, kPieces, kPiece, kPiece * kTileHeads>(
      args.query, smem.query[warpgroup][0], full, cell.batch, tile.head, args.forward.query.head,
      token_of(cell, box_origin(tile, warpgroup), cell.first_query), kDilation[2]);
}

// Blocks with fewer tiles of queries than this start where others do: most of what they wait for is the first keys.
constexpr int kFewTiles = 4;

// Where the walk over the key tiles of a hull begins; what lies before follows in the end. Along one axis: at a key that all
// tiles of queries within a window of each other see, so that blocks that start together do not each load keys of their own,
// and what only one warpgroup sees comes in the middle.
__device__ __forceinline__ int first_tile(const Box& hull) {
  if (kRank > 1 || kDense || kKeyParts || hull.empty()) return 0;
  const Span& keys = hull.axis[2];
  const int shared = geometry::ceil_div(keys.begin, kWindow[2]) * kWindow[2];
  return shared < keys.end ? (shared - keys.begin) / kKeys : 0;
}

// The one thread that calls the copy engine. Key tiles run one ahead of value tiles, as the math does.
__device__ __forceinline__ void load(const Sm90Args& args, Smem& smem) {
  const ForwardArgs& f = args.forward;
  Ring keys, values;
  u32 parity = 0;  // of tiles of queries
  const auto publish = [&](int w, const Job& job) {
    mbarrier_wait(smem_address(&smem.query_empty[w]), parity ^ 1);
    smem.job[w][parity] = job;
  };
  const int grid = static_cast<int>(gridDim.x), first = static_cast<int>(blockIdx.x);
  const int parts = kKeyParts ? args.parts : 1, blocks = args.tiles * parts;
  for (int round = 0; round * grid < blocks; ++round) {
    const int n = tile_of_round(round, first, grid);
    if (n >= blocks) continue;
    Job job;
    job.place = place_of(args, kUneven && !kCrowd ? f.order.nth(n / parts) : n / parts);
    const Cell cell = make_cell(f, job.place.cell);
    const QueryTile tile = tile_of(job.place, cell);
    if (tile.box.empty()) continue;
    const Box hull = note_hulls(smem, cell, tile);
    const int of_hull = key_tiles_of(hull), turned = blocks < kFewTiles * grid ? first_tile(hull) : 0;
    job.key_tiles = of_hull + additional_tiles(f);
    KeyWalk walk;
    if constexpr (kKeyParts) {
      take_part(job, n % parts, parts);
      walk.begin(hull, job.first_key_tile);
    } else {
      walk.begin(hull, turned);
    }
    if (job.key_tiles > 0) load_key(args, smem, cell, tile.kv_head, walk, keys);
    for (int w = 0; w < kWarpgroups; ++w) {
      publish(w, job);
      load_query(args, smem, cell, tile, w);
    }
    parity ^= 1;
    for (int t = 1; t < job.key_tiles; ++t) {
      const KeyWalk before = walk;
      if (kAdditional && turned > 0 && t == of_hull) walk.begin_additional();
      else if (turned > 0 && t == of_hull - turned) walk.begin(hull);
      else walk.next(hull);
      load_key(args, smem, cell, tile.kv_head, walk, keys);
      load_value(args, smem, cell, tile.kv_head, before, values);
    }
    if (job.key_tiles > 0) load_value(args, smem, cell, tile.kv_head, walk, values);
  }
  for (int w = 0; w < kWarpgroups; ++w) {
    Job none;
    none.key_tiles = -1;
    publish(w, none);
    mbarrier_arrive(smem_address(&smem.query_full[w]));
  }
}

}  // namespace vicus::gpu
