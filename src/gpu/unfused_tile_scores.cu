// Scores of queries with the keys they see, with tensor cores; see unfused_tiles.cuh. The 16 keys of a step are the rows
// of the product and the queries its columns: then a lane gets scores of the very keys that it loaded, whose positions it
// knows. Scores of short windows are put in order in shared memory and leave it as whole rows.
#include "unfused_tiles.cuh"

namespace vicus::gpu {

constexpr int kChunks = (kHeadDim + 31) / 32;  // features that four lanes load at once
constexpr bool kStaged = kWindowSlots <= 176;
constexpr int kStagedSlots = kStaged ? static_cast<int>(kWindowSlots) : 1;

using Pieces = uint4[kChunks];

__device__ __forceinline__ void load_row(const Storage* row, Pieces& pieces) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) pieces[c] = load_piece(row, 32 * c + threadIdx.x % 4 * 8);
}

// Products of keys lane / 4 and lane / 4 + 8 with queries, columns as in mma.cuh, the second eight in sums[1].
__device__ __forceinline__ void multiply(const Storage* const (&keys)[2], const Storage* const (&queries)[2],
                                         const Pieces (&held)[kHold ? 2 : 1], float (&sums)[2][4]) {
#pragma unroll(kHold ? kChunks : 2)
  for (int c = 0; c < kChunks; ++c) {
    const int feature = 32 * c + threadIdx.x % 4 * 8;
    const uint4 a = load_piece(keys[0], feature), b = load_piece(keys[1], feature);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 q = kHold ? held[kHold ? half : 0][kHold ? c : 0] : load_piece(queries[half], feature);
      Half::mma(sums[half], {a.x, b.x, a.y, b.y}, q.x, q.y);
      Half::mma(sums[half], {a.z, b.z, a.w, b.w}, q.z, q.w);
    }
  }
}

__device__ __forceinline__ Storage stored(float x) { return Values::store(x); }

// Row of a tile that a lane gets scores of: number `i` of four.
__device__ __forceinline__ int query_of(int i) { return threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }

__device__ __forceinline__ float bias_of(const UnfusedArgs& args, int head, const Token& query, const Token& key) {
  long long index = head * args.bias.head;
#pragma unroll
  for (int a = kFirstAxis; a < 3; ++a) index += (key.at[a] - query.at[a] + kWindow[a] - 1) * args.bias.axis[a];
  return static_cast<float>(load_typed<kBiasType>(args.bias.data, index));
}

// Slots that have no key, of windows that an axis cuts short.
__device__ __forceinline__ void fill_unused(const Tile& tile, const Storage nothing, const Lines& lines,
                                            Storage* scores) {
  for (int r = 0; r < kTileRows; ++r) {
    if (!tile.has(r)) continue;
    const Token at = tile.position(r);
    Storage* const row = scores + lines.at(at);
    for (long long slot = threadIdx.x % 32; slot < kWindowSlots; slot += 32) {
      const long long from[3] = {slot / kWindow[2] / kWindow[1], slot / kWindow[2] % kWindow[1], slot % kWindow[2]};
      bool used = true;
#pragma unroll
      for (int a = kFirstAxis; a < 3; ++a)
        used = used && from[a] < geometry::window(tile.grid.axis[a], at.at[a]).size();
      if (!used) row[slot] = nothing;
    }
  }
}

__device__ __forceinline__ void score_tile(const UnfusedArgs& args, int batch, int head, const Tile& tile,
                                           Storage* stage) {
  const int lane = threadIdx.x % 32, kv_head = head / (args.heads / args.heads_kv);
  const Lines score_lines = lines_of(args.scores, batch, head, tile),
              query_lines = lines_of(args.rows, batch, head, tile);
  const Lines key_lines = lines_of(args.keys, batch, kv_head, tile);
  Storage* const scores = static_cast<Storage*>(args.scores.data);
  Window windows[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) windows[i].note(tile.grid, tile.position(query_of(i)));
  const Storage* const rows[2] = {values(args.rows, query_lines.at(tile.position(lane / 4))),
                                  values(args.rows, query_lines.at(tile.position(lane / 4 + 8)))};
  Pieces held[kHold ? 2 : 1];
  if (kHold) {
    load_row(rows[0], held[0]);
    load_row(rows[1], held[kHold ? 1 : 0]);
  }

  bool cut = false;
#pragma unroll
  for (int a = kFirstAxis; a < 3; ++a) cut = cut || kCausal[a] || tile.grid.axis[a].keys < kWindow[a];
  const Storage nothing = stored(args.zero_unused ? 0.0f : -kInfinity);
  if (cut && kStaged) {
    for (int i = lane; i < kTileRows * kStagedSlots; i += 32) stage[i] = nothing;
    __syncwarp();
  } else if (cut) {
    fill_unused(tile, nothing, score_lines, scores);
  }

  const Box hull = geometry::hull(tile.grid, tile.box);
  const int count = static_cast<int>(hull.volume());
  const Token jump = jump_of(hull, 16);
  Walk walk[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) walk[i].begin(hull, lane / 4 + 8 * i);
#pragma unroll 1
  for (int first = 0; first < count; first += 16) {
    const Storage* const keys[2] = {values(args.keys, key_lines.at(walk[0].position)),
                                    values(args.keys, key_lines.at(walk[1].position))};
    float sums[2][4] = {};
    multiply(keys, rows, held, sums);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int slot = windows[i].slot_of(tile.grid, walk[k].position);
        if (slot < 0 || walk[k].left <= 0 || !tile.has(query_of(i))) continue;
        float s = sums[i / 2][2 * k + i % 2];
        const int r = query_of(i);
        if (args.bias.data != nullptr) s += bias_of(args, head, tile.position(r), walk[k].position);
        if (kStaged) stage[r * kStagedSlots + slot] = stored(s);
        else scores[score_lines.at(tile.position(r)) + slot] = stored(s);
      }
      walk[k].advance(hull, jump, 16);
    }
  }

  for (int first = 0; first < args.tokens; first += 16) {
    const Storage* keys[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int t = geometry::lo(first + lane / 4 + 8 * k, args.tokens - 1);
      keys[k] = values(args.additional, row_of(args.additional, batch, kv_head, {{0, 0, t}}));
    }
    float sums[2][4] = {};
    multiply({keys[0], keys[1]}, rows, held, sums);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int t = first + lane / 4 + i / 4 * 8;
      const int r = query_of(i % 4);
      if (t >= args.tokens || !tile.has(r)) continue;
      scores[score_lines.at(tile.position(r)) + kWindowSlots + t] = stored(sums[i % 4 / 2][i / 4 * 2 + i % 2]);
    }
  }

  if (!kStaged) return;
  __syncwarp();
#pragma unroll 4
  for (int r = 0; r < kTileRows; ++r) {
    if (!tile.has(r)) continue;
    Storage* const row = scores + score_lines.at(tile.position(r));
#pragma unroll
    for (int slot = 0; slot < kStagedSlots; slot += 32) {
      if (slot + lane < kStagedSlots) row[slot + lane] = stage[r * kStagedSlots + slot + lane];
    }
  }
  __syncwarp();
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    unfused_tile_scores(const __grid_constant__ UnfusedArgs args) {
  __shared__ Storage stage[kWarps][kStaged ? kTileRows * kStagedSlots : 1];
  for_each_tile(args, args.heads, [&](int batch, int head, const Tile& tile) {
    score_tile(args, batch, head, tile, stage[threadIdx.x / 32]);
  });
}

}  // namespace vicus::gpu
