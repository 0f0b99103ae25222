// Logsumexp and delta of queries: those of columns, which the kernel for keys reads a tile ahead, and those of rows.
#pragma once

#include "sm90_gradients.cuh"
#include "statistics.cuh"

namespace vicus::gpu {

// Where the statistics of a tile's query are, two floats of each query and head, contiguous: queries and heads are counted,
// in an int.
__device__ __forceinline__ int statistics_of(const BackwardArgs& args, const Cell& cell, const ColumnWalk& at,
                                             int column, bool& exists) {
  const auto step = [&](long long of_floats) { return static_cast<int>(of_floats / 2); };
  const Position q = key_position(at.walk.origin, column);
  const Position token = token_of(cell, q, cell.first_query);
  int row = cell.batch * step(args.statistics.batch) + at.head * step(args.statistics.head);
#pragma unroll
  for (int a = kFirstAxis; a < 3; ++a) {
    exists = exists && q.at[a] < cell.grid.axis[a].queries;
    row += token.at[a] * step(args.statistics.token[a]);
  }
  return row;
}

// Statistics of the queries of each tile, read a tile ahead. Queries that are none have no weight.
__device__ __forceinline__ void load_statistics(const BackwardArgs& args, Smem& smem) {
  constexpr int kOfThread = (kColumns + 32 * kStatisticsWarps - 1) / (32 * kStatisticsWarps);
  constexpr bool kEven = kColumns % (32 * kStatisticsWarps) == 0;
  const Cell& cell = smem.rows.cell;
  const auto column_of = [](int i) { return static_cast<int>(threadIdx.x) - 32 + 32 * kStatisticsWarps * i; };
  float2 of[kOfThread];
  const auto fetch = [&](const ColumnWalk& at) {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      bool exists = kEven || column_of(i) < kColumns;
      const int row = statistics_of(args, cell, at, column_of(i), exists);
      of[i] = {kInfinite, 0.0f};
      if (exists) of[i] = static_cast<const float2*>(args.statistics.data)[row];
    }
  };
  Ring ring;
  ColumnWalk at;
  at.begin(smem);
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
    mbarrier_arrive(smem_address(&smem.full[ring.stage]));  // each for itself
    at.next(smem);
    ring.next();
    if (--left > 0) fetch(at);
  }
}

// The same by threads that have other things to do: each arrives when its copies are there. Queries that are none are hidden
// by masks.
__device__ __forceinline__ void copy_statistics(const BackwardArgs& args, Smem& smem, const ColumnWalk& at, int stage) {
  constexpr int kCopyThreads = 32 * kCopyWarps;
#pragma unroll
  for (int first = 0; first < kColumns; first += kCopyThreads) {
    const int c = first + static_cast<int>(threadIdx.x) - 32 * kFirstCopyWarp;
    if (first + kCopyThreads > kColumns && c >= kColumns) continue;
    bool exists = true;
    const int row = statistics_of(args, smem.rows.cell, at, c, exists);
    const float2* const of = static_cast<const float2*>(args.statistics.data) + (exists ? row : 0);
    cp_async_4(smem_address(&smem.lse[stage][c]), &of->x, exists);
    if constexpr (kSumsFirst) cp_async_4(smem_address(&smem.delta[stage][c]), &of->y, exists);
  }
  mbarrier_arrive_copied(smem_address(&smem.full[stage]));
}

// Of the rows of a thread, `first_row` and 8 more. kCrowd: made here, four threads for each row, for the kernel of keys, too.
template <class PositionOf>
__device__ __forceinline__ void row_statistics(const BackwardArgs& args, const Smem& smem, int first_row,
                                               const PositionOf& position_of, float (&lse)[2], float (&delta)[2]) {
  constexpr int kLanes = 4;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const Cell& cell = smem.rows.cell;
  Position q[2];
  bool exists[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    q[half] = position_of(first_row + 8 * half);
    exists[half] = box_has(smem.rows.tile, first_row + 8 * half, q[half]);
  }
  // Of rows that are none, the first one: no branches, so that all loads are on their way together.
  const auto row_in = [&](const Rows& t, int half) {
    return exists[half] ? place(t, cell, cell.first_query).row(q[half], smem.rows.tile.head) : 0;
  };
  Statistics of[2];
  float dot[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (kCrowd) {
      of[half] = begin_statistics(args, [&](const Rows& t) { return row_in(t, half); });
      dot[half] =
          dot_rows<kLanes>(static_cast<const u16*>(args.output.data) + row_in(args.output, half),
                           static_cast<const u16*>(args.grad_output.data) + row_in(args.grad_output, half), lane);
    } else {
      const float2 at = statistics_at(args, row_in(args.statistics, half));
      of[half] = {at.x, at.y};
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (kCrowd) {
      for (int step = 1; step < kLanes; step *= 2) dot[half] += __shfl_xor_sync(~0u, dot[half], step);
      of[half].delta += dot[half];
      if (exists[half] && lane == 0) {
        statistics_at(args, row_in(args.statistics, half)) = {of[half].lse, of[half].delta};
      }
    }
    lse[half] = exists[half] ? of[half].lse : kInfinite;
    delta[half] = exists[half] ? of[half].delta : 0.0f;
  }
}

}  // namespace vicus::gpu
