// dQ: one block per tile of queries, over the key tiles of its hull, as the forward kernel. No atomics: bit-exact.
//
// Constants of the prologue: those of the forward kernel but kPreScale and kLogsumexp, and those of backward.cuh.
#include "backward.cuh"

namespace vicus::gpu {

constexpr int kWarpRows = 16 * kRowBlocks;
constexpr int kRows = kWarps * kWarpRows;
constexpr u32 kWholeChunk = ~0u >> (32 - kChunk);

static_assert(kKeys % kChunk == 0 && kRows >= kTileHeads * kPositions);

struct Smem {
  u16 query[kRows * kQStride];  // later dQ
  u16 grad_output[kRows * kVStride];
  u16 key[kStages][kKeys * kQStride];
  u16 value[kStages][kKeys * kVStride];
  u64 mask[kRows][kMaskWords];  // keys of the tile that each row sees
};
static_assert(sizeof(Smem) <= kSharedBytes);

// The row's mask for this tile of keys.
__device__ __forceinline__ KeyMask mask_of(const BackwardArgs& args, const Span (&seen)[3], bool exists,
                                           const KeyWalk& walk) {
  KeyMask mask;
  if (kAdditional && walk.additional) {
    for (int w = 0; w < kMaskWords; ++w) {
      mask.word[w] = exists ? bits_between(0, args.additional - walk.origin.at[2] - 64 * w) : 0;
    }
  } else {
    mask = key_mask(seen, walk.origin);
  }
  return mask;
}

// Bits of a row's mask for the chunk that starts at column `first`.
__device__ __forceinline__ u32 chunk_bits(const u64 (&mask)[kMaskWords], int first) {
  return static_cast<u32>(mask[first / 64] >> (first % 64)) & kWholeChunk;
}

// Logits to P, and dP to dS. `bits` of each of the lane's rows.
template <bool kMasked>
__device__ __forceinline__ void differentiate(const BackwardArgs& args, const Statistics (&rows)[kRowBlocks][2],
                                              const u32 (&bits)[kRowBlocks][2], const Cell& cell, const QueryTile& tile,
                                              const KeyWalk& walk, int first, Chunk& s, Chunk& dp) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool biased = kBiasKind != kBiasNone && !(kAdditional && walk.additional);
      long long bias = 0;
      if (kBiasKind != kBiasNone) {
        const int row = warp * kWarpRows + 16 * m + 8 * half + lane / 4;
        bias = bias_row(args, cell, tile.head + row / kPositions, row_position(tile, row));
      }
      const u32 lane_bits = bits[m][half] >> (2 * (lane % 4));
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          bool seen = !kMasked || (lane_bits >> (8 * n + i) & 1) != 0;
          float x = s.at[m][n][2 * half + i] * args.scale_log2 - rows[m][half].lse;
          if (kMasked && biased && seen) {
            const float b = bias_at(args, bias, key_position(walk.origin, first + 8 * n + 2 * (lane % 4) + i));
            seen = b != -1.0f / 0.0f;
            x += b;
          }
          const float p = exp2_approx(x);
          const float ds = p * (dp.at[m][n][2 * half + i] - rows[m][half].delta);
          dp.at[m][n][2 * half + i] = seen ? ds : 0.0f;
        }
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_queries(const __grid_constant__ BackwardArgs args) {
  extern __shared__ __align__(128) unsigned char dynamic[];
  Smem& smem = *reinterpret_cast<Smem*>(dynamic);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const BlockTiles all = tiles_of_block(args);
  const Cell& cell = all.cell;
  const QueryTile& tile = all.tile;
  if (tile.box.empty()) return;
  Box hull;
  int tiles = 1;
  for (int a = 0; a < 3; ++a) {
    hull.axis[a] = a < kFirstAxis ? Span{0, 1} : geometry::hull(cell.grid.axis[a], tile.box.axis[a]);
    tiles *= a < kFirstAxis ? 1 : geometry::ceil_div(geometry::hi(hull.axis[a].size(), 0), kTileKv[a]);
  }
  if (kAdditional) tiles += geometry::ceil_div(args.additional, kKeys);

  Sources from;
  from.key = place(args.key, cell, cell.first_key);
  from.value = place(args.value, cell, cell.first_key);
  if (kAdditional) {
    from.additional_key = place_additional(args.additional_keys, cell);
    from.additional_value = place_additional(args.additional_values, cell);
  }
  for (int a = kFirstAxis; a < 3; ++a) from.limit[a] = cell.grid.axis[a].keys;

  load_query_rows<kRows, kHeadDim, kQStride, kThreads>(args.query, place(args.query, cell, cell.first_query), tile,
                                                       smem.query);
  load_query_rows<kRows, kHeadDimV, kVStride, kThreads>(
      args.grad_output, place(args.grad_output, cell, cell.first_query), tile, smem.grad_output);
  cp_async_commit();
  KeyWalk ahead;
  ahead.begin(hull);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < tiles) {
      load_keys(args, from, ahead, tile.kv_head, smem.key[s], smem.value[s]);
      ahead.next(hull);
    }
    cp_async_commit();
  }

  // What the row of this lane sees, and statistics of the rows of its accumulators.
  const int own_row = warp * kWarpRows + lane % kWarpRows;
  const Position own = row_position(tile, own_row);
  const bool exists = row_exists(tile, own_row, own);
  Span seen[3];
  for (int a = kFirstAxis; a < 3; ++a) seen[a] = exists ? geometry::window(cell.grid.axis[a], own.at[a]) : Span{0, 0};
  Statistics rows[kRowBlocks][2];
  const Placed statistics = place(args.statistics, cell, cell.first_query);
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * kWarpRows + 16 * m + 8 * half + lane / 4;
      const Position p = row_position(tile, row);
      rows[m][half] = {0, 0};
      if (row_exists(tile, row, p)) {
        const float2 two = *reinterpret_cast<const float2*>(static_cast<const float*>(args.statistics.data) +
                                                            statistics.row(p, tile.head + row / kPositions));
        rows[m][half] = {two.x, two.y};
      }
    }
  }

  Resident<kDq> query;
  Resident<kDv> grad_output;
  query.begin(smem.query, warp * kWarpRows);
  grad_output.begin(smem.grad_output, warp * kWarpRows);
  Sums<kDq> sums = {};
  KeyWalk walk;
  walk.begin(hull);
  int stage = 0;
  for (int t = 0; t < tiles; ++t) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (t == 0) {
      query.hold();
      grad_output.hold();
    }
    if (t + kStages - 1 < tiles) {
      const int free = stage == 0 ? kStages - 1 : stage - 1;
      load_keys(args, from, ahead, tile.kv_head, smem.key[free], smem.value[free]);
      ahead.next(hull);
    }
    cp_async_commit();
    const KeyMask own_mask = mask_of(args, seen, exists, walk);
    for (int w = 0; w < kMaskWords; ++w) smem.mask[own_row][w] = own_mask.word[w];
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < kKeys; first += kChunk) {
      const u32 own_bits = chunk_bits(smem.mask[own_row], first);
      if (!__any_sync(~0u, own_bits != 0)) continue;
      const bool masked = kBiasKind != kBiasNone || !__all_sync(~0u, own_bits == kWholeChunk);
      const u16* keys = smem.key[stage] + first * kQStride;
      Chunk s, dp;
      query.dot(keys, s);
      grad_output.dot(smem.value[stage] + first * kVStride, dp);
      u32 bits[kRowBlocks][2];
      bool wrong = false;
      if (masked) {
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          for (int half = 0; half < 2; ++half) {
            bits[m][half] = chunk_bits(smem.mask[warp * kWarpRows + 16 * m + 8 * half + lane / 4], first);
          }
        }
        const float finite = note_finite(s, 0.0f);
        wrong = __any_sync(~0u, finite != 0.0f);
        differentiate<true>(args, rows, bits, cell, tile, walk, first, s, dp);
      } else {
        differentiate<false>(args, rows, bits, cell, tile, walk, first, s, dp);
      }
      Weights weights;
      pack(dp, weights);
      if (wrong) {
        const auto sees = [&](int c, int row) {
          return (chunk_bits(smem.mask[warp * kWarpRows + row], first) >> c & 1) != 0;
        };
        add_seen<kQStride>(weights, keys, sees, sums);
      } else {
        add<kQStride>(weights, keys, sums);
      }
    }
    __syncwarp();  // masks are read before they are written again
    walk.next(hull);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  __syncthreads();

  put<kQStride>(sums, args.scale_log2 * kLn2, smem.query + warp * kWarpRows * kQStride);
  __syncwarp();
  store_query_rows<kHeadDim, kQStride, kWarpRows>(args.grad_query, place(args.grad_query, cell, cell.first_query), tile,
                                                  smem.query, warp * kWarpRows);
}

}  // namespace vicus::gpu
