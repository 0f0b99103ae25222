// What the backward kernels share. With P = 2^(S - lse), dP = dO Vt, dS = P * (dP - delta), where delta = sum_f dO O -
// dlse (Dao 2022, algorithm 4; Dao 2023): dV = Pt dO, dK = scale dSt Q, dQ = scale dS K.
//
// Warps own 16 * kRowBlocks resident rows (keys, or queries) and meet the others as columns, kChunk at a time: S and dP
// of a chunk become P and dS in the registers where they are, which are operand A of the sums over columns as they lie.
// So weights never go through shared memory, but between warps that share rows, or where a product needs them
// transposed.
//
// Values that are not finite: a pair that is not seen has weight zero, but zero times NaN is NaN. In chunks that need a
// mask, logits and dP are checked before they are masked; a NaN in a column's row makes all of them NaN. Such a chunk
// is added column by column, with unseen pairs left out (`add_seen`): nothing is done twice, and chunks that every row
// sees need no care.
//
// Constants of the prologue: those of the forward kernel, kChunk, kHold (resident operands stay in registers).
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

#include "bias.cuh"
#include "keys.cuh"

namespace vicus::gpu {

constexpr float kLn2 = 0.693147180559945309f;

static_assert((kChunk == 16 || kChunk == 32) && kRowBlocks <= 2);

// Of a query: logsumexp in powers of two (+inf where nothing is seen, so that weights are zero), and delta.
struct Statistics {
  float lse, delta;
};

// Logits of the resident rows and a chunk of columns. Block m holds rows 16 m + lane / 4 (registers 0, 1) and 8 more
// (2, 3), columns 8 n + 2 (lane % 4) and the next.
struct Chunk {
  float at[kRowBlocks][kChunk / 8][4];
};
template <int kFeatures>
struct Sums {
  float at[kRowBlocks][kFeatures / 8][4];
};

// A chunk as operand A of a product over its columns.
struct Weights {
  u32 at[kChunk / 16][kRowBlocks][4];
};

__device__ __forceinline__ void pack(const Chunk& chunk, Weights& weights) {
#pragma unroll
  for (int j = 0; j < kChunk / 16; ++j) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float(&w)[4] = chunk.at[m][2 * j + n];
        weights.at[j][m][2 * n] = Half::pack(w[0], w[1]);
        weights.at[j][m][2 * n + 1] = Half::pack(w[2], w[3]);
      }
    }
  }
}

// The resident rows of a warp as operand A of products over features.
template <int kWidth>
struct Resident {
  u32 smem;
  u32 held[kHold ? kWidth / 16 : 1][kRowBlocks][4];

  __device__ __forceinline__ void begin(const u16* rows, int first_row) {
    const int lane = threadIdx.x % 32;
    smem = smem_address(rows) + 2 * ((first_row + lane % 16) * (kWidth + 8) + lane / 16 * 8);
  }
  __device__ __forceinline__ void load(int d, u32 (&a)[kRowBlocks][4]) const {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) ldmatrix_x4(a[m], smem + 2 * (16 * m * (kWidth + 8) + d));
  }
  __device__ __forceinline__ void hold() {
    if constexpr (kHold) {
#pragma unroll
      for (int d = 0; d < kWidth; d += 16) load(d, held[d / 16]);
    }
  }
  // chunk[row][column] = resident[row] . columns[column]
  __device__ __forceinline__ void dot(const u16* columns, Chunk& chunk) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) chunk.at[m][n][i] = 0;
      }
    }
    const u32 b = smem_address(columns) + 2 * ((lane % 8 + lane / 16 * 8) * (kWidth + 8) + lane / 8 % 2 * 8);
#pragma unroll
    for (int d = 0; d < kWidth; d += 16) {
      u32 a[kRowBlocks][4];
      if constexpr (kHold) {
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = held[d / 16][m][i];
        }
      } else {
        load(d, a);
      }
#pragma unroll
      for (int n = 0; n < kChunk / 8; n += 2) {
        u32 c[4];
        ldmatrix_x4(c, b + 2 * (8 * n * (kWidth + 8) + d));
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          Half::mma(chunk.at[m][n], a[m], c[0], c[1]);
          Half::mma(chunk.at[m][n + 1], a[m], c[2], c[3]);
        }
      }
    }
  }
};

// sums[row][f] += weights[row][column] * columns[column][f]
template <int kStride, int kFeatures>
__device__ __forceinline__ void add(const Weights& weights, const u16* columns, Sums<kFeatures>& sums) {
  const int lane = threadIdx.x % 32;
  const u32 b = smem_address(columns) + 2 * (lane % 16 * kStride + lane / 16 * 8);
#pragma unroll
  for (int j = 0; j < kChunk / 16; ++j) {
#pragma unroll
    for (int f = 0; f < kFeatures / 8; f += 2) {
      u32 c[4];
      ldmatrix_x4_trans(c, b + 2 * (16 * j * kStride + 8 * f));
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        Half::mma(sums.at[m][f], weights.at[j][m], c[0], c[1]);
        Half::mma(sums.at[m][f + 1], weights.at[j][m], c[2], c[3]);
      }
    }
  }
}

// The same, of the pairs that are seen only: seen(column, row of the warp).
template <int kStride, int kFeatures, class Seen>
__device__ __forceinline__ void add_seen(const Weights& weights, const u16* columns, const Seen& seen,
                                         Sums<kFeatures>& sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int c = 0; c < kChunk; ++c) {
    const u16* column = columns + c * kStride + 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u32 two = 0;  // the pair of columns that holds c, in lane c % 8 / 2 of the row
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n) {
          two |= weights.at[n / 2][m][n % 2 * 2 + half] & (c / 8 == n ? ~0u : 0u);
        }
        two = __shfl_sync(~0u, two, lane / 4 * 4 + c % 8 / 2);
        const float w = Half::unpack(static_cast<u16>(c % 2 == 0 ? two & 0xffff : two >> 16));
        if (!seen(c, 16 * m + 8 * half + lane / 4)) continue;
        if (kBiasKind == kBiasAdditive && w == 0) continue;  // perhaps hidden by the bias
#pragma unroll
        for (int f = 0; f < kFeatures / 8; ++f) {
#pragma unroll
          for (int i = 0; i < 2; ++i) sums.at[m][f][2 * half + i] += w * Half::unpack(column[8 * f + i]);
        }
      }
    }
  }
}

// sums * factor to 16-bit rows in shared memory.
template <int kStride, int kFeatures>
__device__ __forceinline__ void put(const Sums<kFeatures>& sums, float factor, u16* smem) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u16* row = smem + (16 * m + 8 * half + lane / 4) * kStride + 2 * (lane % 4);
#pragma unroll
      for (int f = 0; f < kFeatures / 8; ++f) {
        *reinterpret_cast<u32*>(row + 8 * f) =
            Half::pack(sums.at[m][f][2 * half] * factor, sums.at[m][f][2 * half + 1] * factor);
      }
    }
  }
}

enum class ChunkUse { skip, whole, masked };

// NaN once a value was not finite.
__device__ __forceinline__ float note_finite(const Chunk& chunk, float so_far) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) so_far = fmaf(chunk.at[m][n][i], 0.0f, so_far);
    }
  }
  return so_far;
}

}  // namespace vicus::gpu
