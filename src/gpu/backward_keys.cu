// dK and dV: one block per box of keys and key/value head, over the tiles of queries that see the box, of all query
// heads of the group, so that nothing is summed across blocks: bit-exact. With kAdditionalTile the keys are additional
// tokens of a batch entry, which all queries of all its cells see. With kAddQueries dQ is summed on the way, in float32
// scratch with atomics: five products instead of seven, but not bit-exact.
//
// kSplits warps share 16 * kRowBlocks keys: each makes the weights of its own columns, hands them to the others through
// shared memory (fragments of a lane, for the same lane), and sums its own part of the features for all columns. That
// is for head dims whose sums no warp can hold.
//
// Small windows: a warp owns a box of keys, held in registers, and meets of each tile of queries the box around those that
// see its keys. With one stage, the only tile of a head covers the hull.
//
// Constants of the prologue: those of backward.cuh, kAddQueries. `work.tiles` counts tiles of kTileKv keys, or of as many
// additional tokens; there is a block for each of them, key/value head and cell (for additional tokens: batch entry).
#include "backward_sums.cuh"

namespace vicus::gpu {

__device__ __forceinline__ void load_queries(const BackwardArgs& args, const QueryWalk& walk, Smem& smem, int stage) {
  const Cell& cell = walk.cell;
  load_query_tile<kQueryRows>(args, walk, smem.query[stage], smem.grad_output[stage]);
  const Placed statistics = place(args.statistics, cell, cell.first_query);
  for (int row = threadIdx.x; row < kQueryRows; row += kThreads) {
    const Position p = row_position(walk.tile, row);
    const bool exists = row_exists(walk.tile, row, p);
    const float* from = static_cast<const float*>(args.statistics.data) +
                        (exists ? statistics.row(p, walk.tile.head + row / kPositions) : 0);
    cp_async_8(smem_address(&smem.statistics[stage][row]), from, exists);
  }
}

// Statistics of the lane's columns of a chunk: 8 n + 2 (lane % 4) + i.
struct ColumnStatistics {
  Statistics at[kChunk / 8][2];
};
__device__ __forceinline__ ColumnStatistics statistics_of(const Statistics* queries, const MetRows& rows, int first) {
  const int lane = threadIdx.x % 32;
  ColumnStatistics of;
  Statistics own;  // where rows are gathered, lanes look for one column each and ask each other
  if constexpr (kGathers) own = queries[rows.row(first / 16, lane % kChunk)];
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * n + 2 * (lane % 4) + i;
      if constexpr (kGathers) of.at[n][i] = {__shfl_sync(~0u, own.lse, column), __shfl_sync(~0u, own.delta, column)};
      else of.at[n][i] = queries[first + column];
    }
  }
  return of;
}

// What dP begins with: -delta where the statistics fit into registers as long, zero where it is subtracted later.
__device__ __forceinline__ void begin_grads(const ColumnStatistics& of, Chunk& dp) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dp.at[m][n][i] = kGathers ? -of.at[n][i % 2].delta : 0.0f;
    }
  }
}

// Logits to P, dP to dS, for the columns from `first` on.
template <bool kMasked>
__device__ __forceinline__ void differentiate(const BackwardArgs& args, const KeyBlock& block, int first,
                                              const ChunkSeen& bits, const Meeting& meeting, const QueryWalk& walk,
                                              const ColumnStatistics& of, Chunk& s, Chunk& dp) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      long long bias = 0;
      if (kBiasKind != kBiasNone && !kAdditionalTile) {
        const int column = first + 8 * n + 2 * (lane % 4) + i;
        bias = bias_row(args, walk.cell, walk.tile.head + column / kPositions,
                        kGathers ? met_position(meeting.origin, column) : row_position(walk.tile, column));
      }
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          bool seen = !kMasked || bits.of(m, half, 2 * n + i);
          float x = s.at[m][n][2 * half + i] * args.scale_log2 - of.at[n][i].lse;
          if (kBiasKind != kBiasNone && !kAdditionalTile && seen) {
            Position key;
            key_row(block, block.keys, first_row() + 16 * m + 8 * half + lane / 4, key);
            const float b = bias_at(args, bias, key);
            seen = b != -kInfinite;
            x += b;
          }
          const float grad = dp.at[m][n][2 * half + i] - (kGathers ? 0.0f : of.at[n][i].delta);
          const float p = exp2_approx(x), ds = p * grad;
          s.at[m][n][2 * half + i] = seen ? p : 0.0f;
          dp.at[m][n][2 * half + i] = seen ? ds : 0.0f;
        }
      }
    }
  }
}

// To and from the other warps of the same keys.
using Exchange = u32[kExchanged > 0 ? kExchanged : 1][32];
__device__ __forceinline__ void give(Exchange& to, const Weights<kChunk>& p, const Weights<kChunk>& ds) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kExchanged / 2; ++i) {
    to[i][lane] = p.at[i / 4 / kRowBlocks][i / 4 % kRowBlocks][i % 4];
    to[kExchanged / 2 + i][lane] = ds.at[i / 4 / kRowBlocks][i / 4 % kRowBlocks][i % 4];
  }
}
__device__ __forceinline__ void take(const Exchange& from, Weights<kChunk>& p, Weights<kChunk>& ds) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kExchanged / 2; ++i) {
    p.at[i / 4 / kRowBlocks][i / 4 % kRowBlocks][i % 4] = from[i][lane];
    ds.at[i / 4 / kRowBlocks][i / 4 % kRowBlocks][i % 4] = from[kExchanged / 2 + i][lane];
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_keys(const __grid_constant__ BackwardArgs args) {
  begin_after_others(args.followed);
  extern __shared__ __align__(128) unsigned char dynamic[];
  Smem& smem = *reinterpret_cast<Smem*>(dynamic);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % kSplits;
  if (threadIdx.x == 0) smem.block.prepare(args);
  __syncthreads();
  const KeyBlock& block = smem.block;
  if (block.stored.empty()) return;
  const KeyTile keys = block.tile;

  note_windows(smem.windows, block.keys, [&](int a, int p) {
    return kAdditionalTile ? Span{0, geometry::kMaxLen} : geometry::queries_of(axis_of(block.cell, a), {p, p + 1});
  });
  if constexpr (!kGathers) {
    const auto row = [&](int r, Position& p) { return key_row(block, block.keys, r, p); };
    load_rows<kRows, kHeadDim, kThreads>(kAdditionalTile ? args.additional_keys : args.key, block.key, keys.kv_head,
                                         row, smem.key);
    load_rows<kRows, kHeadDimV, kThreads>(kAdditionalTile ? args.additional_values : args.value, block.value,
                                          keys.kv_head, row, smem.value);
  }
  cp_async_commit();
  __syncthreads();

  if (threadIdx.x == 0) {
    Box hull;
    for (int a = 0; a < 3; ++a) {
      const int count = block.keys.axis[a].size();
      const Span* seen = smem.windows.seen[a];
      hull.axis[a] = a < kFirstAxis ? Span{0, 1} : count > 0 ? Span{seen[0].begin, seen[count - 1].end} : Span{0, 0};
    }
    smem.walk[0].begin(args, keys, block.cell, hull, block.first_cell, block.last_cell);
    for (int s = 1; s < kStages; ++s) {
      smem.walk[s] = smem.walk[s - 1];
      smem.walk[s].next(args);
    }
  }
  __syncthreads();
  const auto follow = [&](QueryWalk& walk, const QueryWalk& before) {
    if (threadIdx.x != 0) return;
    walk = before;
    walk.next(args);
  };
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (!smem.walk[s].done) load_queries(args, smem.walk[s], smem, s);
    cp_async_commit();
  }
  Resident<kHeadDim, kHeld> key_rows;
  Resident<kHeadDimV, kHeld> value_rows;
  if constexpr (kGathers) {
    const auto row_of = [&](const Rows& tensor, const Placed& placed, int r) -> TensorRow {
      Position p;
      const bool exists = key_row(block, block.keys, first_row() + r, p);
      return {static_cast<const u16*>(tensor.data) + placed.row(p, keys.kv_head), exists};
    };
    clear_spare_rows<kHeadDim>(smem.query);
    clear_spare_rows<kHeadDimV>(smem.grad_output);
    if (static_cast<int>(threadIdx.x) < kSpareRows) {
      for (int s = 0; s < kStages; ++s) smem.statistics[s][kQueryRows + threadIdx.x] = {0, 0};
    }
    key_rows.load([&](int r) { return row_of(args.key, block.key, r); });
    value_rows.load([&](int r) { return row_of(args.value, block.value, r); });
  } else {
    key_rows.begin(smem.key);
    value_rows.begin(smem.value);
  }
  if (kStages == 1) follow(smem.walk[1], smem.walk[0]);

  Sums<kPartQ> key_sums = {};
  Sums<kPartV> value_sums = {};
  bool careful = false;
  int stage = 0, at = 0, buffer = 0;  // at: of the ring of walks
  const auto ring = [&](int ahead) { return at + ahead > kStages ? at + ahead - kStages - 1 : at + ahead; };
  for (bool first_tile = true; !smem.walk[at].done; first_tile = false) {
    cp_async_wait<kAhead - 1>();
    __syncthreads();
    if (!kGathers && first_tile) {
      key_rows.hold();
      value_rows.hold();
      if constexpr (kAddQueries) careful = __syncthreads_or(!finite_keys(smem)) != 0;
    }
    const QueryWalk& next = smem.walk[ring(kAhead)];
    if constexpr (kStages > 1) {
      if (!next.done) load_queries(args, next, smem, stage == 0 ? kStages - 1 : stage - 1);
      follow(smem.walk[ring(kStages)], next);
    }
    cp_async_commit();
    const QueryWalk& walk = smem.walk[at];
    const u16* grad_output = kAlike ? smem.query[stage] : smem.grad_output[stage];
    const int grads_ahead = kAlike ? static_cast<int>(smem.grad_output[stage] - smem.query[stage]) : 0;
    const ChunkedMeeting meeting = meet_in_chunks(smem.windows, met_tile(walk.tile));
    const int steps = meeting.use == TileUse::skip && !kAddQueries ? 0 : kGathers ? 16 * kColumnSteps : kQueryRows;
#pragma unroll 1
    for (int step = 0; step < steps; step += kStep) {
      const int first = step + part * kChunk;
      ChunkSeen seen = chunk_seen(meeting, first / 16);
      Use use = meeting.use == TileUse::skip || seen.use == TileUse::skip ? kSkip : kPlain;
      Weights<kChunk> p, ds;
      if (use != kSkip) {
        Chunk s, dp;
        ColumnStatistics of;
        if constexpr (kGathers) of = statistics_of(smem.statistics[stage], meeting.rows, first);
        clear(s);
        begin_grads(of, dp);
        key_rows.dot(smem.query[stage], 0, meeting.rows, first / 16, s);
        value_rows.dot(grad_output, grads_ahead, meeting.rows, first / 16, dp);
        if constexpr (!kGathers) of = statistics_of(smem.statistics[stage], meeting.rows, first);
        if (seen.use == TileUse::whole) {
          differentiate<false>(args, block, first, seen, meeting, walk, of, s, dp);
        } else {
          if (any_infinite(s, dp)) use = kCareful;
          differentiate<true>(args, block, first, seen, meeting, walk, of, s, dp);
        }
        pack(s, p);
        pack(dp, ds);
      }
      if constexpr (kAddQueries) put_grad_scores(smem, first, use != kSkip, ds);
      if constexpr (kSplits > 1) {
        if (use != kSkip) give(smem.weights[buffer][warp], p, ds);
        if (lane == 0) smem.use[buffer][warp] = use;
        barrier_sync(1 + warp / kSplits, 32 * kSplits);
      }
#pragma unroll 1
      for (int other = 0; other < kSplits; ++other) {  // in the same order in all warps
        const int n = (step + other * kChunk) / 16;
        if constexpr (kSplits > 1) {
          use = static_cast<Use>(smem.use[buffer][warp - part + other]);
          if (use != kSkip) take(smem.weights[buffer][warp - part + other], p, ds);
        }
        if (use == kSkip) continue;
        if (use == kPlain) {
          add<kHeadDimV>(p, grad_output, grads_ahead, meeting.rows, n, part * kPartV, value_sums);
          add<kHeadDim>(ds, smem.query[stage], 0, meeting.rows, n, part * kPartQ, key_sums);
        } else {
          if constexpr (kSplits > 1) seen = chunk_seen(meeting, n);
          add_seen<kHeadDimV>(p, smem.grad_output[stage], meeting.rows, n, part * kPartV, seen, value_sums);
          add_seen<kHeadDim>(ds, smem.query[stage], meeting.rows, n, part * kPartQ, seen, key_sums);
        }
      }
      buffer ^= 1;
    }
    if constexpr (kAddQueries) {
      __syncthreads();
      add_query_sums(args, smem, careful, walk);
    }
    if constexpr (kStages == 1) {
      __syncthreads();
      if (!next.done) {
        load_queries(args, next, smem, 0);
        follow(smem.walk[at], next);
      }
      cp_async_commit();
    }
    at = ring(1);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Position p;
      const bool exists = key_row(block, block.stored, first_row() + 16 * m + 8 * half + lane / 4, p);
      const auto store = [&](const Rows& tensor, const Placed& placed) {
        return static_cast<u16*>(tensor.data) + placed.row(p, keys.kv_head);
      };
      const Rows& grad_key = kAdditionalTile ? args.grad_additional_keys : args.grad_key;
      const Rows& grad_value = kAdditionalTile ? args.grad_additional_values : args.grad_value;
      u32 of_key[kPartQ / 8], of_value[kPartV / 8];
      pack_row(key_sums, m, half, args.scale_log2 * kLn2, of_key);
      pack_row(value_sums, m, half, 1.0f, of_value);
      store_row<kHeadDim>(store(grad_key, block.grad_key), exists && grad_key.data != nullptr, part * kPartQ, of_key);
      store_row<kHeadDimV>(store(grad_value, block.grad_value), exists && grad_value.data != nullptr, part * kPartV,
                           of_value);
    }
  }
}

}  // namespace vicus::gpu
