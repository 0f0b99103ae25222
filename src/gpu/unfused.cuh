// The unfused operators: scores of every query with the keys of its window in memory, one slot each (row-major over the
// window, then the additional tokens), and sums by them. Every result has one owner, which gathers; sums run in one order.
//
//   unfused_scores         scores = rows . keys (+ bias)         qk forward, av backward for scores     a warp per query
//   unfused_to_queries     rows = sum of scores * keys           av forward, qk backward for queries    a warp per query
//   unfused_to_keys        keys = sum of scores * rows           backward for keys and values           a warp per key
//   unfused_to_additional  the same for the additional tokens                                           a block per token
//   unfused_to_bias        bias = sum of scores                                                         a block per entry
//
// Grids: a warp per token along x, [B, H] (keys: [B, Hkv]) along y as far as it goes; blocks over [B, Hkv, T] and over
// [H, 2 w0 - 1, ...], last fastest.
//
// Constants of the prologue: those of plain_elements.cuh, kRank, kHeadDim, kWindow, kStep, kCausal, kDilation, kBiasType
// (of what unfused_scores reads and unfused_to_bias writes), kWarps.
#pragma once

#include "plain_elements.cuh"
#include "unfused_args.h"
#include "vicus/geometry.h"

namespace vicus::gpu {

using geometry::Box;
using geometry::Span;

constexpr int kThreads = kWarps * 32;
constexpr int kFirstAxis = 3 - kRank;
constexpr long long kWindowSlots = static_cast<long long>(kWindow[0]) * kWindow[1] * kWindow[2];
constexpr int kDotLanes = 8;                                            // lanes of a dot product
constexpr int kColumns = (kHeadDim + 32 * kPiece - 1) / (32 * kPiece);  // pieces of a lane when a warp has a row
constexpr int kSlice = kColumns < 4 ? kColumns : 4;                     // of them at a time

struct Token {
  int at[3];
};

// A position of a residue class.
struct Place {
  geometry::Grid grid;
  int residue[3], at[3];
  __device__ __forceinline__ Token token(int i, int j, int k) const {
    return {{geometry::token_of(i, kDilation[0], residue[0]), geometry::token_of(j, kDilation[1], residue[1]),
             geometry::token_of(k, kDilation[2], residue[2])}};
  }
};

__device__ __forceinline__ Place place_of(const UnfusedArgs& args, const Token& t) {
  Place p;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    p.residue[a] = t.at[a] % kDilation[a];
    p.at[a] = t.at[a] / kDilation[a];
    p.grid.axis[a] = geometry::neighborhood_axis(geometry::class_len(args.len[a], kDilation[a], p.residue[a]),
                                                 kWindow[a], kStep[a], kCausal[a]);
  }
  return p;
}

__device__ __forceinline__ Box window_of(const Place& p, int i, int j, int k) {
  return {
      {geometry::window(p.grid.axis[0], i), geometry::window(p.grid.axis[1], j), geometry::window(p.grid.axis[2], k)}};
}

__device__ __forceinline__ long long row_of(const Rows& t, int batch, int head, const Token& at) {
  return batch * t.batch + head * t.head + at.at[0] * t.token[0] + at.at[1] * t.token[1] + at.at[2] * t.token[2];
}
__device__ __forceinline__ const Storage* values(const Rows& t, long long offset) {
  return static_cast<const Storage*>(t.data) + offset;
}
__device__ __forceinline__ Storage* targets(const Rows& t, long long offset) {
  return static_cast<Storage*>(t.data) + offset;
}

__device__ __forceinline__ u32 tokens_of(const UnfusedArgs& args) {
  return static_cast<u32>(args.len[0]) * args.len[1] * args.len[2];
}
__device__ __forceinline__ Token token_at(const UnfusedArgs& args, u32 index) {
  Token token;
#pragma unroll
  for (int a = 2; a >= 0; --a) {
    token.at[a] = static_cast<int>(index % args.len[a]);
    index /= args.len[a];
  }
  return token;
}

// Calls `each(batch, head, token)` for what the warp has of [B, heads, *X].
template <class Each>
__device__ __forceinline__ void for_each_row(const UnfusedArgs& args, int heads, const Each& each) {
  const u32 index = blockIdx.x * static_cast<u32>(kWarps) + threadIdx.x / 32;
  if (index >= tokens_of(args)) return;
  const Token token = token_at(args, index);
  for (int y = blockIdx.y; y < args.batch * heads; y += gridDim.y) each(y / heads, y % heads, token);
}

// kSlice pieces of a row in a warp: piece i of slice s begins at column ((s * kSlice + i) * 32 + lane) * kPiece.
struct Sums {
  Acc at[kSlice][kPiece] = {};
  static __device__ __forceinline__ int column(int slice, int i) {
    return ((slice * kSlice + i) * 32 + static_cast<int>(threadIdx.x) % 32) * kPiece;
  }
  __device__ __forceinline__ void add(const Storage* row, Acc weight, int slice) {
#pragma unroll
    for (int i = 0; i < kSlice; ++i) {
      const int first = column(slice, i);
      if (first >= kHeadDim) continue;
      Acc x[kPiece];
      load_values(row + first, x);
#pragma unroll
      for (int v = 0; v < kPiece; ++v) at[i][v] += weight * x[v];
    }
  }
};

__device__ __forceinline__ void store_sums(const Acc (&at)[kSlice][kPiece], Storage* row, int slice) {
#pragma unroll
  for (int i = 0; i < kSlice; ++i) {
    const int first = Sums::column(slice, i);
    if (first < kHeadDim) store_values(row + first, at[i]);
  }
}

}  // namespace vicus::gpu
