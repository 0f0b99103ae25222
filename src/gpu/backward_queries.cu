// dQ: one block per tile of queries, over the key tiles of its hull, as the forward kernel. No atomics: bit-exact. Where warps
// meet parts of tiles, rows are short of work and delta is made here, too.
//
// Constants of the prologue: those of backward.cuh.
#include "backward.cuh"

namespace vicus::gpu {

static_assert(!kOwnsKeys && (kGathers || kKeys % kChunk == 0));

struct Shared : QueryBlock {
  Placed grad_output, grad_query, statistics;
  Placed output;  // where delta is made
};

struct Smem {
  u16 key[kStages][(kKeys + kSpareRows) * kQStride];
  u16 value[kStages][(kKeys + kSpareRows) * kVStride];
  u16 query[kGathers ? 8 : kRows * kQStride];
  u16 grad_output[kGathers ? 8 : kRows * kVStride];
  Windows windows;
  KeyWalk walk[kStages];  // where the key tile of a stage is
  Shared shared;
};
static_assert(sizeof(Smem) <= kSharedBytes);

// Row of the lane's accumulators.
__device__ __forceinline__ int row_of_lane(int m, int half) {
  return first_row() + 16 * m + 8 * half + static_cast<int>(threadIdx.x) % 32 / 4;
}

// Logits to P, and dP - delta to dS.
template <bool kMasked>
__device__ __forceinline__ void differentiate(const BackwardArgs& args, const Statistics (&rows)[kRowBlocks][2],
                                              const ChunkSeen& bits, const Cell& cell, const QueryTile& tile,
                                              const Meeting& meeting, int first, Chunk& s, Chunk& dp) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool biased = kBiasKind != kBiasNone && !meeting.additional;
      long long bias = 0;
      if (kBiasKind != kBiasNone) {
        const int row = row_of_lane(m, half);
        bias = bias_row(args, cell, tile.head + row / kPositions, row_position(tile, row));
      }
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          bool seen = !kMasked || bits.of(m, half, 2 * n + i);
          float x = s.at[m][n][2 * half + i] * args.scale_log2 - rows[m][half].lse;
          if (kMasked && biased && seen) {
            const float b = bias_at(args, bias, met_position(meeting.origin, first + 8 * n + 2 * (lane % 4) + i));
            seen = b != -kInfinite;
            x += b;
          }
          const float p = exp2_approx(x);
          const float ds = p * dp.at[m][n][2 * half + i];
          dp.at[m][n][2 * half + i] = seen ? ds : 0.0f;
        }
      }
    }
  }
}

// Of the rows of the lane's accumulators.
__device__ __forceinline__ void read_statistics(const BackwardArgs& args, const Shared& shared, const QueryTile& tile,
                                                Statistics (&rows)[kRowBlocks][2]) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of_lane(m, half);
      const Position p = row_position(tile, row);
      rows[m][half] = {0, 0};
      if (!row_exists(tile, row, p)) continue;
      const float2 of = statistics_at(args, shared.statistics.row(p, tile.head + row / kPositions));
      rows[m][half] = {of.x, of.y};
    }
  }
}

// Makes them, for the kernel of keys, too.
__device__ __forceinline__ void make_statistics(const BackwardArgs& args, const Shared& shared, const QueryTile& tile,
                                                Statistics (&rows)[kRowBlocks][2]) {
  constexpr int kLanes = 4;  // that share a row
  const int lane = threadIdx.x % kLanes;
  const Cell& cell = shared.all.cell;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
    float dot[2];
    Position p[2];
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      p[half] = row_position(tile, row_of_lane(m, half));
      exists[half] = row_exists(tile, row_of_lane(m, half), p[half]);
    }
    // Of rows that are none, the first one: no branches, so that all loads are on their way together.
    const auto row_in = [&](const Placed& placed, int half) {
      return exists[half] ? placed.row(p[half], tile.head) : 0;
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[m][half] =
          begin_statistics(args, [&](const Rows& t) { return row_in(place(t, cell, cell.first_query), half); });
      dot[half] =
          dot_rows<kLanes>(static_cast<const u16*>(args.output.data) + row_in(shared.output, half),
                           static_cast<const u16*>(args.grad_output.data) + row_in(shared.grad_output, half), lane);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Statistics& of = rows[m][half];
      for (int step = 1; step < kLanes; step *= 2) dot[half] += __shfl_xor_sync(~0u, dot[half], step);
      of.delta += dot[half];
      if (exists[half] && lane == 0) statistics_at(args, row_in(shared.statistics, half)) = {of.lse, of.delta};
      if (!exists[half]) of = {0, 0};
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_queries(const __grid_constant__ BackwardArgs args) {
  begin_after_others(args.followed);
  extern __shared__ __align__(128) unsigned char dynamic[];
  Smem& smem = *reinterpret_cast<Smem*>(dynamic);
  if (threadIdx.x == 0) {
    Shared& shared = smem.shared;
    shared.prepare(args);
    const Cell& cell = shared.all.cell;
    shared.grad_output = place(args.grad_output, cell, cell.first_query);
    shared.grad_query = place(args.grad_query, cell, cell.first_query);
    shared.statistics = place(args.statistics, cell, cell.first_query);
    if (kGathers) shared.output = place(args.output, cell, cell.first_query);
  }
  __syncthreads();
  const Shared& shared = smem.shared;
  if (shared.all.tile.box.empty()) return;
  const QueryTile& tile = shared.all.tile;
  const Sources& from = shared.from;
  const Box& hull = shared.hull;
  const auto tiles = [&] { return kStages == 1 ? 1 : shared.tiles; };

  if constexpr (!kGathers) {
    load_query_rows<kRows, kHeadDim, kThreads>(args.query, shared.query, tile, smem.query);
    load_query_rows<kRows, kHeadDimV, kThreads>(args.grad_output, shared.grad_output, tile, smem.grad_output);
    cp_async_commit();
  }
  KeyWalk ahead;
  ahead.begin(hull);
  const auto load_next = [&](int into) {
    if (threadIdx.x == 0) smem.walk[into] = ahead;
    load_keys(args, from, ahead, tile.kv_head, smem.key[into], smem.value[into]);
    ahead.next(hull);
  };
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (s < tiles()) load_next(s);
    cp_async_commit();
  }

  Resident<kHeadDim, kHeld> query;
  Resident<kHeadDimV, kHeld> grad_output;
  if constexpr (kGathers) {
    query.load([&](int r) { return query_row(args.query, shared.query, tile, first_row() + r); });
    grad_output.load([&](int r) { return query_row(args.grad_output, shared.grad_output, tile, first_row() + r); });
  } else {
    query.begin(smem.query);
    grad_output.begin(smem.grad_output);
  }
  clear_spare_rows<kHeadDim>(smem.key);
  clear_spare_rows<kHeadDimV>(smem.value);

  note_windows(smem.windows, tile.box, [&](int a, int p) { return geometry::window(axis_of(shared.all.cell, a), p); });
  Statistics rows[kRowBlocks][2];
  if constexpr (kGathers) make_statistics(args, shared, tile, rows);
  else read_statistics(args, shared, tile, rows);

  Sums<kDq> sums = {};
  int stage = 0;
  for (int t = 0; t < tiles(); ++t) {
    cp_async_wait<kAhead - 1>();
    __syncthreads();
    if (!kGathers && t == 0) {
      query.hold();
      grad_output.hold();
    }
    if (kStages > 1 && t + kAhead < tiles()) load_next(stage == 0 ? kStages - 1 : stage - 1);
    cp_async_commit();
    const ChunkedMeeting meeting = meet_in_chunks(smem.windows, met_tile(args, smem.walk[stage]));
    const int steps = meeting.use == TileUse::skip ? 0 : kColumnSteps;
#pragma unroll 1
    for (int n = 0; n < steps; n += kChunk / 16) {
      const ChunkSeen seen = chunk_seen(meeting, n);
      if (seen.use == TileUse::skip) continue;
      Chunk s, dp;
      clear(s);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) dp.at[m][j][i] = -rows[m][i / 2].delta;
        }
      }
      query.dot(smem.key[stage], 0, meeting.rows, n, s);
      grad_output.dot(kAlike ? smem.key[stage] : smem.value[stage],
                      kAlike ? static_cast<int>(smem.value[stage] - smem.key[stage]) : 0, meeting.rows, n, dp);
      bool wrong = false;
      if (seen.use == TileUse::masked) {
        wrong = any_infinite(s, dp);
        differentiate<true>(args, rows, seen, shared.all.cell, tile, meeting, 16 * n, s, dp);
      } else {
        differentiate<false>(args, rows, seen, shared.all.cell, tile, meeting, 16 * n, s, dp);
      }
      Weights<kChunk> weights;
      pack(dp, weights);
      if (wrong) {
        add_seen<kHeadDim>(weights, smem.key[stage], meeting.rows, n, 0, seen, sums);
      } else {
        add<kHeadDim>(weights, smem.key[stage], 0, meeting.rows, n, 0, sums);
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 two[kDq / 8];
      pack_row(sums, m, half, args.scale_log2 * kLn2, two);
      const int row = anew(row_of_lane(m, half));
      const Position p = row_position(tile, row);
      store_row<kHeadDim>(
          static_cast<u16*>(args.grad_query.data) + shared.grad_query.row(p, tile.head + row / kPositions),
          row_exists(tile, row, p), 0, two);
    }
  }
}

}  // namespace vicus::gpu
