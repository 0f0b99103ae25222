// Sums by the scores, a warp per row: of keys for a query (and the additional tokens), and of queries for a key; see
// unfused.cuh.
#pragma once

#include "unfused.cuh"

namespace vicus::gpu {

__device__ __forceinline__ void sum_to_query(const UnfusedArgs& args, int batch, int head, const Token& at) {
  const int kv_head = head / (args.heads / args.heads_kv);
  const Place q = place_of(args, at);
  const Box window = window_of(q, q.at[0], q.at[1], q.at[2]);
  const Storage* scores = values(args.scores, row_of(args.scores, batch, head, at));
  Storage* out = targets(args.rows, row_of(args.rows, batch, head, at));
  for (int slice = 0; slice * kSlice < kColumns; ++slice) {
    Sums sums;
    for (int i = window.axis[0].begin; i < window.axis[0].end; ++i) {
      for (int j = window.axis[1].begin; j < window.axis[1].end; ++j) {
        const long long line =
            (static_cast<long long>(i - window.axis[0].begin) * kWindow[1] + j - window.axis[1].begin) * kWindow[2] -
            window.axis[2].begin;
#pragma unroll 4
        for (int k = window.axis[2].begin; k < window.axis[2].end; ++k) {
          sums.add(values(args.keys, row_of(args.keys, batch, kv_head, q.token(i, j, k))),
                   Values::load(scores[line + k]), slice);
        }
      }
    }
    for (int t = 0; t < args.tokens; ++t) {
      sums.add(values(args.additional, row_of(args.additional, batch, kv_head, {{0, 0, t}})),
               Values::load(scores[kWindowSlots + t]), slice);
    }
    store_sums(sums.at, out, slice);
  }
}

__device__ __forceinline__ void sum_to_key(const UnfusedArgs& args, int batch, int kv_head, const Token& at) {
  const int group = args.heads / args.heads_kv;
  const Place k = place_of(args, at);
  Box queries;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    queries.axis[a] = a < kFirstAxis ? Span{0, 1} : geometry::queries_of(k.grid.axis[a], {k.at[a], k.at[a] + 1});
  }
  Storage* out = targets(args.keys, row_of(args.keys, batch, kv_head, at));
  for (int slice = 0; slice * kSlice < kColumns; ++slice) {
    Sums sums;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int i = queries.axis[0].begin; i < queries.axis[0].end; ++i) {
        const long long plane = k.at[0] - geometry::window(k.grid.axis[0], i).begin;
        for (int j = queries.axis[1].begin; j < queries.axis[1].end; ++j) {
          const long long line = plane * kWindow[1] + k.at[1] - geometry::window(k.grid.axis[1], j).begin;
#pragma unroll 4
          for (int n = queries.axis[2].begin; n < queries.axis[2].end; ++n) {
            const long long slot = line * kWindow[2] + k.at[2] - geometry::window(k.grid.axis[2], n).begin;
            const Token token = k.token(i, j, n);
            sums.add(values(args.rows, row_of(args.rows, batch, head, token)),
                     Values::load(*values(args.scores, row_of(args.scores, batch, head, token) + slot)), slice);
          }
        }
      }
    }
    store_sums(sums.at, out, slice);
  }
}

}  // namespace vicus::gpu
