// What the backward kernels share. With P = 2^(S - lse), dP = dO Vt, dS = P * (dP - delta), where delta = sum_f dO O -
// dlse (Dao 2022, algorithm 4; Dao 2023): dV = Pt dO, dK = scale dSt Q, dQ = scale dS K.
//
// Warps own 16 * kRowBlocks rows (keys, or queries) and meet the others as columns, kChunk at a time: S and dP
// of a chunk become P and dS in the registers where they are, which are operand A of the sums over columns as they lie.
// So weights never go through shared memory, but between warps that share rows, or where a product needs them
// transposed.
//
// Values that are not finite: a pair that is not seen has weight zero, but zero times NaN is NaN. In chunks that need a
// mask, logits and dP are checked before they are masked; a NaN in a column's row makes all of them NaN. Such a chunk
// is added column by column, with unseen pairs left out (`add_seen`): nothing is done twice, and chunks that every row
// sees need no care.
//
// Constants of the prologue: those of products.cuh, kStages, kMinBlocks, kSharedBytes, kHold (resident operands stay in
// registers; where warps meet parts of tiles, they always do).
//
// Tiles. Compiled by NVRTC 12.8 for sm_80, sm_90 and sm_120 (2026-11-22), these have no stack and no spills; KiB are
// those of shared memory with two stages. Larger head dims do not fit.
//
// backward_keys, most registers and KiB with kAddQueries. Dense attention only:
//   D    kWarps kSplits kRowBlocks kChunk kHold keys queries registers KiB
//   32        4       1          2     16   yes  128      64       254  62
//   64        4       1          2     16    no  128      64       255  94
//   96        8       1          1     32    no  128      64       248 126
//   128       8       1          1     32    no  128      64       255 158
//   256       8       2          1     16    no   64      32       255 155
// Boxes, additional tokens and relative biases too:
//   32, 64    4       1          1     16   yes   64      64       248  42, 66
//   96        4       1          1     16    no   64      32       236  60
//   128       8       2          1     16    no   64      32       226  91
//   192       8       2          1     16    no   64      32       248 123
//   256       8       4          1     16    no   32      64       208 189
// For 99 KiB (sm_86, sm_89, sm_120): 128 with 4 warps, one split, 64 keys, 32 queries (75 KiB); 192 with 4 warps, 32
// keys, 32 queries (88 KiB); 256 with 2 warps, two splits, 16 keys, 32 queries (90 KiB; with kAddQueries dense only).
//
// backward_queries, 4 warps; 64 keys up to D 96, 32 keys above. Not biased:
//   D         kRowBlocks kChunk kHold rows registers KiB
//   32                 2     32   yes  128       255  42
//   64                 2     32    no  128       255  74
// Everything:
//   32, 64, 96         1     16   yes   64       255  31, 55, 79
//   128                1     16    no   64       208  69
//   192, 256           1     16    no   64       255  101, 133
// For 99 KiB: 192 with 16 keys (76 KiB), 256 with 2 warps and 16 keys (67 KiB).
#pragma once

#include "products.cuh"
#include "statistics.cuh"

namespace vicus::gpu {

constexpr float kLn2 = 0.693147180559945309f;
constexpr int kAhead = kStages > 1 ? kStages - 1 : 1;  // tiles that are loaded before the first is used
constexpr bool kHeld = kHold || kGathers;
constexpr bool kAlike = kHeadDim == kHeadDimV;  // rows of both have the same layout

static_assert((kChunk == 16 || kChunk == 32) && kRowBlocks <= 2);

using Chunk = Scores<kChunk>;

// What a warp sees of a chunk: of each row of a lane's accumulators, two bits for every 8 columns.
struct ChunkSeen {
  TileUse use;
  u32 at[kRowBlocks][2];
  __device__ __forceinline__ bool of(int m, int half, int column) const {  // a column of the lane's: 2 n + i
    return (at[m][half] & 1u << column) != 0;
  }
};

// A meeting chunk by chunk, and what is seen of all of them.
struct ChunkedMeeting : Meeting {
  SeenBits seen;
};

__device__ __forceinline__ ChunkedMeeting meet_in_chunks(const Windows& windows, const MetTile& tile) {
  ChunkedMeeting meeting{meet(windows, tile), {}};
  if (meeting.use == TileUse::masked || (meeting.use == TileUse::whole && kBiasKind != kBiasNone)) {
    meeting.seen = seen_bits(windows, tile, meeting.origin);
  } else if (meeting.use == TileUse::whole) {
    for (int m = 0; m < kRowBlocks; ++m) meeting.seen.at[m][0] = meeting.seen.at[m][1] = ~static_cast<Bits>(0);
  }
  return meeting;
}

// Of the chunk whose columns start at 16 n.
__device__ __forceinline__ ChunkSeen chunk_seen(const ChunkedMeeting& meeting, int n) {
  constexpr u32 kAll = (1u << (kChunk / 4)) - 1;
  ChunkSeen seen;
  u32 any = 0, all = kAll;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 bits = static_cast<u32>(meeting.seen.at[m][half] >> (4 * n)) & kAll;
      seen.at[m][half] = bits;
      any |= bits;
      all &= bits;
    }
  }
  seen.use = !__any_sync(~0u, any != 0)                                            ? TileUse::skip
             : !kGathers && kBiasKind == kBiasNone && __all_sync(~0u, all == kAll) ? TileUse::whole
                                                                                   : TileUse::masked;
  return seen;
}

// As `add`, of the pairs that are seen only.
template <int kWidth, int kFeatures>
__device__ __forceinline__ void add_seen(const Weights<kChunk>& weights, const u16* columns, const MetRows& rows, int n,
                                         int first, const ChunkSeen& seen, Sums<kFeatures>& sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int c = 0; c < kChunk; ++c) {
    const int from = lane / 4 * 4 + c % 8 / 2;  // the lane that holds c, of the row
    const int column_row = rows.row(n, c);
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u32 two = 0;  // the pair of columns that holds c
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) two |= weights.at[j / 2][m][j % 2 * 2 + half] & (c / 8 == j ? ~0u : 0u);
        two = __shfl_sync(~0u, two, from);
        const float w = Half::unpack(static_cast<u16>(c % 2 == 0 ? two & 0xffff : two >> 16));
        const u32 bits = __shfl_sync(~0u, seen.at[m][half], from);
        if ((bits >> (c / 8 * 2 + c % 2) & 1) == 0) continue;
        if (kBiasKind == kBiasAdditive && w == 0) continue;  // perhaps hidden by the bias
#pragma unroll
        for (int f = 0; f < kFeatures / 8; ++f) {
          const u16* column = columns + Layout<kWidth>::at(column_row, first + 8 * f) + 2 * (lane % 4);
#pragma unroll
          for (int i = 0; i < 2; ++i) sums.at[m][f][2 * half + i] += w * Half::unpack(column[i]);
        }
      }
    }
  }
}

// Whether a value of the warp's chunks was not finite; or perhaps, where products are too large.
__device__ __forceinline__ bool any_infinite(const Chunk& s, const Chunk& dp) {
  float sum = 0;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum = fmaf(s.at[m][n][i], dp.at[m][n][i], sum);
    }
  }
  return __any_sync(~0u, !(fabsf(sum) < kInfinite));
}

}  // namespace vicus::gpu
