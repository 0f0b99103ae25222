// dK and dV: one block per box of keys and key/value head, over the tiles of queries that see the box, of all query
// heads of the group, so that nothing is summed across blocks: bit-exact. With kAdditionalTile the keys are additional
// tokens of a batch entry, which all queries of all its cells see. With kAddQueries dQ is summed on the way, in float32
// scratch with atomics: five products instead of seven, but not bit-exact.
//
// kSplits warps share 16 * kRowBlocks keys: each makes the weights of its own columns, hands them to the others through
// shared memory (fragments of a lane, for the same lane), and sums its own part of the features for all columns. That
// is for head dims whose sums no warp can hold.
//
// Constants of the prologue: those of backward_queries.cu, kSplits, kAdditionalTile, kAddQueries. `work.tiles` counts
// tiles of kTileKv keys, or of as many additional tokens; there is a block for each of them, key/value head and cell
// (for additional tokens: batch entry).
#include "backward_walk.cuh"

namespace vicus::gpu {

constexpr int kWarpRows = 16 * kRowBlocks;
constexpr int kRows = kWarps / kSplits * kWarpRows;  // keys
constexpr int kRowWords = (kRows + 63) / 64;
constexpr int kStep = kChunk * kSplits;
constexpr int kQueryRows = geometry::ceil_div(kTileHeads * kPositions, kStep) * kStep;
constexpr int kPartQ = kDq / kSplits, kPartV = kDv / kSplits;  // features that a warp sums
constexpr u32 kAllRows = ~0u >> (32 - kWarpRows);
constexpr int kExchanged = kSplits > 1 ? 2 * (kChunk / 16) * kRowBlocks * 4 : 0;  // registers
constexpr int kWeightStride = kQueryRows + 8;
enum Use { kSkip, kPlain, kCareful };

static_assert(kRows >= kKeys && kWarps % kSplits == 0 && kDq % (16 * kSplits) == 0 && kDv % (16 * kSplits) == 0);

struct Smem {
  u16 key[kRows * kQStride];  // later dK
  u16 value[kRows * kVStride];
  u16 query[kStages][kQueryRows * kQStride];
  u16 grad_output[kStages][kQueryRows * kVStride];
  Statistics statistics[kStages][kQueryRows];
  u64 mask[kStages][kQueryRows][kRowWords];  // keys that each query sees
  u32 weights[2][kSplits > 1 ? kWarps : 1][kExchanged > 0 ? kExchanged : 1][32];
  int use[2][kWarps];
  QueryWalk walk[kStages + 1];  // of the tile that is multiplied, those that are loaded, and one more
  __align__(16) u16 grad_scores[kAddQueries ? kRows * kWeightStride : 8];  // dS, a row for each key
};
static_assert(sizeof(Smem) <= kSharedBytes);

// Where key row `row` of the tile lies; whether it exists, given the keys of each axis.
__device__ __forceinline__ bool key_row(const KeyTile& keys, const int (&limit)[3], int row, Position& p) {
  if constexpr (kAdditionalTile) {
    p = {{0, 0, keys.origin.at[2] + row}};
    return row < kKeys && p.at[2] < limit[2];
  }
  p = key_position(keys.origin, row);
  bool exists = row < kKeys;
  for (int a = kFirstAxis; a < 3; ++a) exists = exists && p.at[a] < limit[a];
  return exists;
}

__device__ __forceinline__ void load_queries(const BackwardArgs& args, const QueryWalk& walk, const KeyTile& keys,
                                             Smem& smem, int stage) {
  const Cell& cell = walk.cell;
  load_query_tile<kQueryRows>(args, walk, smem.query[stage], smem.grad_output[stage]);
  const Placed statistics = place(args.statistics, cell, cell.first_query);
  for (int row = threadIdx.x; row < kQueryRows; row += kThreads) {
    const Position p = row_position(walk.tile, row);
    const bool exists = row_exists(walk.tile, row, p);
    const float* from = static_cast<const float*>(args.statistics.data) +
                        (exists ? statistics.row(p, walk.tile.head + row / kPositions) : 0);
    cp_async_8(smem_address(&smem.statistics[stage][row]), from, exists);
    mask_keys(args, walk, keys, row, smem.mask[stage][row]);
  }
}

// Bits of the warp's keys, from `first_row`, that a query sees.
__device__ __forceinline__ u32 key_bits(const u64 (&mask)[kRowWords], int first_row) {
  return static_cast<u32>(mask[first_row / 64] >> (first_row % 64)) & kAllRows;
}

// Logits to P, dP to dS, for the columns from `first`.
template <bool kMasked>
__device__ __forceinline__ void differentiate(const BackwardArgs& args, const Smem& smem, int stage, int first,
                                              int first_row, const KeyTile& keys, const QueryWalk& walk, Chunk& s,
                                              Chunk& dp) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first + 8 * n + 2 * (lane % 4) + i;
      const Statistics of = smem.statistics[stage][column];
      const u32 bits = kMasked ? key_bits(smem.mask[stage][column], first_row) >> (lane / 4) : 0;
      long long bias = 0;
      if (kBiasKind != kBiasNone && !kAdditionalTile) {
        bias = bias_row(args, walk.cell, walk.tile.head + column / kPositions, row_position(walk.tile, column));
      }
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          bool seen = !kMasked || (bits >> (16 * m + 8 * half) & 1) != 0;
          float x = s.at[m][n][2 * half + i] * args.scale_log2 - of.lse;
          if (kBiasKind != kBiasNone && !kAdditionalTile && seen) {
            const float b = bias_at(args, bias, key_position(keys.origin, first_row + 16 * m + 8 * half + lane / 4));
            seen = b != -1.0f / 0.0f;
            x += b;
          }
          const float p = exp2_approx(x), ds = p * (dp.at[m][n][2 * half + i] - of.delta);
          s.at[m][n][2 * half + i] = seen ? p : 0.0f;
          dp.at[m][n][2 * half + i] = seen ? ds : 0.0f;
        }
      }
    }
  }
}

// To and from the other warps of the same keys.
using Exchange = u32[kExchanged > 0 ? kExchanged : 1][32];
__device__ __forceinline__ void give(Exchange& to, const Weights& p, const Weights& ds) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kExchanged / 2; ++i) {
    to[i][lane] = p.at[i / 4 / kRowBlocks][i / 4 % kRowBlocks][i % 4];
    to[kExchanged / 2 + i][lane] = ds.at[i / 4 / kRowBlocks][i / 4 % kRowBlocks][i % 4];
  }
}
__device__ __forceinline__ void take(const Exchange& from, Weights& p, Weights& ds) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kExchanged / 2; ++i) {
    p.at[i / 4 / kRowBlocks][i / 4 % kRowBlocks][i % 4] = from[i][lane];
    ds.at[i / 4 / kRowBlocks][i / 4 % kRowBlocks][i % 4] = from[kExchanged / 2 + i][lane];
  }
}

// dS of the warp's keys and the columns from `first`, for the product with keys.
__device__ __forceinline__ void put_grad_scores(Smem& smem, int first, int first_row, bool any, const Weights& ds) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u16* row = smem.grad_scores + (first_row + 16 * m + 8 * half + lane / 4) * kWeightStride + first + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
        *reinterpret_cast<u32*>(row + 8 * n) = any ? ds.at[n / 2][m][n % 2 * 2 + half] : 0;
      }
    }
  }
}

// Whether the keys that the thread looks at are finite.
__device__ __forceinline__ bool finite_keys(const Smem& smem) {
  float sum = 0;
  for (int i = threadIdx.x; i < kRows * (kDq / 2); i += kThreads) {
    const u32 two = *reinterpret_cast<const u32*>(smem.key + i / (kDq / 2) * kQStride + i % (kDq / 2) * 2);
    sum = fmaf(Half::unpack(static_cast<u16>(two)), 0.0f, fmaf(Half::unpack(static_cast<u16>(two >> 16)), 0.0f, sum));
  }
  return sum == 0;
}

// Adds dS K to the sums of the tile's queries: 16 queries and kWidth features at a time. `careful`: some keys are not
// finite, and unseen pairs are left out.
__device__ __forceinline__ void add_query_sums(const BackwardArgs& args, const Smem& smem, int stage, bool careful,
                                               const QueryWalk& walk) {
  constexpr int kWidth = kDq % 64 == 0 ? 64 : kDq % 32 == 0 ? 32 : 16;
  const int lane = threadIdx.x % 32;
  for (int unit = threadIdx.x / 32; unit < kQueryRows / 16 * (kDq / kWidth); unit += kWarps) {
    const int row = unit % (kQueryRows / 16) * 16, feature = unit / (kQueryRows / 16) * kWidth;
    float sums[kWidth / 8][4] = {};
    if (careful) {
#pragma unroll 1
      for (int k = 0; k < kKeys; ++k) {
        const u16* key = smem.key + k * kQStride + feature + 2 * (lane % 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int query = row + 8 * half + lane / 4;
          const float w = Half::unpack(smem.grad_scores[k * kWeightStride + query]);
          if ((smem.mask[stage][query][k / 64] >> (k % 64) & 1) == 0) continue;
          if (kBiasKind == kBiasAdditive && w == 0) continue;  // perhaps hidden by the bias
#pragma unroll
          for (int f = 0; f < kWidth / 8; ++f) {
            sums[f][2 * half] += w * Half::unpack(key[8 * f]);
            sums[f][2 * half + 1] += w * Half::unpack(key[8 * f + 1]);
          }
        }
      }
    } else {
      const u32 a =
          smem_address(smem.grad_scores) + 2 * ((lane % 8 + lane / 16 * 8) * kWeightStride + row + lane / 8 % 2 * 8);
      const u32 b = smem_address(smem.key) + 2 * (lane % 16 * kQStride + feature + lane / 16 * 8);
#pragma unroll 2
      for (int k = 0; k < kRows; k += 16) {
        u32 weights[4];
        ldmatrix_x4_trans(weights, a + 2 * k * kWeightStride);
#pragma unroll
        for (int f = 0; f < kWidth / 8; f += 2) {
          u32 c[4];
          ldmatrix_x4_trans(c, b + 2 * (k * kQStride + 8 * f));
          Half::mma(sums[f], weights, c[0], c[1]);
          Half::mma(sums[f + 1], weights, c[2], c[3]);
        }
      }
    }
    const Placed placed = place(args.query_sums, walk.cell, walk.cell.first_query);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + 8 * half + lane / 4;
      const Position p = row_position(walk.tile, query);
      if (!row_exists(walk.tile, query, p)) continue;
      float* to = static_cast<float*>(args.query_sums.data) + placed.row(p, walk.tile.head + query / kPositions) +
                  feature + 4 * (lane % 4);
#pragma unroll
      for (int f = 0; f < kWidth / 8; f += 2) {
        red_add(to + 8 * f, sums[f][2 * half], sums[f][2 * half + 1], sums[f + 1][2 * half], sums[f + 1][2 * half + 1]);
      }
    }
  }
}

template <int kWidth, int kStride>
__device__ __forceinline__ void store_keys(const Rows& tensor, const Placed& placed, const KeyTile& keys,
                                           const int (&limit)[3], const u16* smem) {
  constexpr int kChunks = (kWidth + 7) / 8;
  if (tensor.data == nullptr) return;
  for (int index = threadIdx.x; index < kKeys * kChunks; index += kThreads) {
    const int row = index / kChunks, column = index % kChunks * 8;
    Position p;
    if (!key_row(keys, limit, row, p)) continue;
    u16* to = static_cast<u16*>(tensor.data) + placed.row(p, keys.kv_head) + column;
    const u16* from = smem + row * kStride + column;
    if constexpr (kVectors) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < 8; ++i) {
        if (column + i < kWidth) to[i] = from[i];
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_keys(const __grid_constant__ BackwardArgs args) {
  extern __shared__ __align__(128) unsigned char dynamic[];
  Smem& smem = *reinterpret_cast<Smem*>(dynamic);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int part = warp % kSplits, first_row = warp / kSplits * kWarpRows;

  int block = static_cast<int>(blockIdx.x);
  KeyTile keys;
  for (int a = 2; a >= 0; --a) {
    keys.origin.at[a] = 0;
    if (a < kFirstAxis) continue;
    keys.origin.at[a] = block % args.work.tiles[a] * (kAdditionalTile ? (a == 2 ? kKeys : 1) : kTileKv[a]);
    block /= args.work.tiles[a];
  }
  keys.kv_head = block % args.heads_kv;
  block /= args.heads_kv;

  Cell cell;
  int first_cell = block, last_cell = block + 1;
  int limit[3], stored[3];  // keys to load, and to store: padding has zero gradients
  Placed key, value, grad_key, grad_value;
  if constexpr (kAdditionalTile) {  // block: a batch entry
    cell.batch = block;
    const int classes = kDense ? 1 : args.work.classes[0] * args.work.classes[1] * args.work.classes[2];
    first_cell = kPacked ? 0 : block * classes;
    last_cell = kPacked ? args.sequences : first_cell + classes;
    limit[2] = stored[2] = args.additional;
    key = place_additional(args.additional_keys, cell);
    value = place_additional(args.additional_values, cell);
    grad_key = place_additional(args.grad_additional_keys, cell);
    grad_value = place_additional(args.grad_additional_values, cell);
  } else {
    cell = make_cell(args, block);
    for (int a = kFirstAxis; a < 3; ++a) {
      limit[a] = cell.grid.axis[a].keys;
      stored[a] = kKeyLengths ? args.keys : limit[a];
      if (keys.origin.at[a] >= stored[a]) return;
    }
    key = place(args.key, cell, cell.first_key);
    value = place(args.value, cell, cell.first_key);
    grad_key = place(args.grad_key, cell, cell.first_key);
    grad_value = place(args.grad_value, cell, cell.first_key);
  }
  const auto row = [&](int r, Position& p) { return key_row(keys, limit, r, p); };
  load_rows<kRows, kHeadDim, kQStride, kThreads>(kAdditionalTile ? args.additional_keys : args.key, key, keys.kv_head,
                                                 row, smem.key);
  load_rows<kRows, kHeadDimV, kVStride, kThreads>(kAdditionalTile ? args.additional_values : args.value, value,
                                                  keys.kv_head, row, smem.value);
  cp_async_commit();

  if (threadIdx.x == 0) {
    smem.walk[0].begin(args, keys, first_cell, last_cell);
    for (int s = 1; s < kStages; ++s) {
      smem.walk[s] = smem.walk[s - 1];
      smem.walk[s].next(args, keys);
    }
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (!smem.walk[s].done) load_queries(args, smem.walk[s], keys, smem, s);
    cp_async_commit();
  }

  Resident<kDq> key_rows;
  Resident<kDv> value_rows;
  key_rows.begin(smem.key, first_row);
  value_rows.begin(smem.value, first_row);
  Sums<kPartQ> key_sums = {};
  Sums<kPartV> value_sums = {};
  bool careful = false;
  int stage = 0, at = 0, buffer = 0;  // at: of the ring of walks
  const auto ring = [&](int ahead) { return at + ahead > kStages ? at + ahead - kStages - 1 : at + ahead; };
  for (bool first_tile = true; !smem.walk[at].done; first_tile = false) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (first_tile) {
      key_rows.hold();
      value_rows.hold();
      if constexpr (kAddQueries) careful = __syncthreads_or(!finite_keys(smem)) != 0;
    }
    const QueryWalk& next = smem.walk[ring(kStages - 1)];
    if (!next.done) load_queries(args, next, keys, smem, stage == 0 ? kStages - 1 : stage - 1);
    cp_async_commit();
    if (threadIdx.x == 0) {
      QueryWalk& later = smem.walk[ring(kStages)];
      later = next;
      later.next(args, keys);
    }
    const QueryWalk& walk = smem.walk[at];
#pragma unroll 1
    for (int step = 0; step < kQueryRows; step += kStep) {
      const int first = step + part * kChunk;
      const u32 bits = key_bits(smem.mask[stage][first + lane % kChunk], first_row);
      Use use = __any_sync(~0u, bits != 0) ? kPlain : kSkip;
      Weights p, ds;
      if (use != kSkip) {
        Chunk s, dp;
        key_rows.dot(smem.query[stage] + first * kQStride, s);
        value_rows.dot(smem.grad_output[stage] + first * kVStride, dp);
        if (__all_sync(~0u, bits == kAllRows)) {
          differentiate<false>(args, smem, stage, first, first_row, keys, walk, s, dp);
        } else {
          const float finite = note_finite(dp, note_finite(s, 0.0f));
          if (__any_sync(~0u, finite != 0.0f)) use = kCareful;
          differentiate<true>(args, smem, stage, first, first_row, keys, walk, s, dp);
        }
        pack(s, p);
        pack(dp, ds);
      }
      if constexpr (kAddQueries) put_grad_scores(smem, first, first_row, use != kSkip, ds);
      if constexpr (kSplits > 1) {
        if (use != kSkip) give(smem.weights[buffer][warp], p, ds);
        if (lane == 0) smem.use[buffer][warp] = use;
        barrier_sync(1 + warp / kSplits, 32 * kSplits);
      }
#pragma unroll 1
      for (int other = 0; other < kSplits; ++other) {  // in the same order in all warps
        const int columns = step + other * kChunk;
        if constexpr (kSplits > 1) {
          use = static_cast<Use>(smem.use[buffer][warp - part + other]);
          if (use != kSkip) take(smem.weights[buffer][warp - part + other], p, ds);
        }
        if (use == kSkip) continue;
        const u16* query = smem.query[stage] + columns * kQStride + part * kPartQ;
        const u16* grad_output = smem.grad_output[stage] + columns * kVStride + part * kPartV;
        if (use == kPlain) {
          add<kVStride>(p, grad_output, value_sums);
          add<kQStride>(ds, query, key_sums);
        } else {
          const auto sees = [&](int c, int r) {
            return (key_bits(smem.mask[stage][columns + c], first_row) >> r & 1) != 0;
          };
          add_seen<kVStride>(p, grad_output, sees, value_sums);
          add_seen<kQStride>(ds, query, sees, key_sums);
        }
      }
      buffer ^= 1;
    }
    if constexpr (kAddQueries) {
      __syncthreads();
      add_query_sums(args, smem, stage, careful, walk);
    }
    at = ring(1);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  __syncthreads();
  put<kQStride>(key_sums, args.scale_log2 * kLn2, smem.key + first_row * kQStride + part * kPartQ);
  put<kVStride>(value_sums, 1.0f, smem.value + first_row * kVStride + part * kPartV);
  __syncthreads();
  store_keys<kHeadDim, kQStride>(kAdditionalTile ? args.grad_additional_keys : args.grad_key, grad_key, keys, stored,
                                 smem.key);
  store_keys<kHeadDimV, kVStride>(kAdditionalTile ? args.grad_additional_values : args.grad_value, grad_value, keys,
                                  stored, smem.value);
}

}  // namespace vicus::gpu
