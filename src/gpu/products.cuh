// Products of the rows that a warp owns with columns, which are rows of other tiles in shared memory. Constants of the
// prologue: those of meeting.cuh.
//
// A warp owns 16 * kRowBlocks rows. Accumulators: block m holds rows 16 m + lane / 4 (registers 0, 1) and 8 more (2, 3),
// columns 8 n + 2 (lane % 4) and the next, of logits; or features in place of columns, of sums over columns.
#pragma once

#include "meeting.cuh"

namespace vicus::gpu {

template <int kColumns>
struct Scores {
  float at[kRowBlocks][kColumns / 8][4];
};
template <int kColumns>
__device__ __forceinline__ void clear(Scores<kColumns>& scores) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores.at[m][n][i] = 0;
    }
  }
}
template <int kFeatures>
struct Sums {
  float at[kRowBlocks][kFeatures / 8][4];
};

// Scores as operand A of a product over their columns.
template <int kColumns>
struct Weights {
  u32 at[kColumns / 16][kRowBlocks][4];
};

template <int kColumns>
__device__ __forceinline__ void pack(const Scores<kColumns>& scores, Weights<kColumns>& weights) {
#pragma unroll
  for (int j = 0; j < kColumns / 16; ++j) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float(&w)[4] = scores.at[m][2 * j + n];
        weights.at[j][m][2 * n] = Half::pack(w[0], w[1]);
        weights.at[j][m][2 * n + 1] = Half::pack(w[2], w[3]);
      }
    }
  }
}

// The rows of a warp as operand A of products over features: read from shared memory again and again, or held.
template <int kWidth, bool kHeld>
struct Resident {
  using Of = Layout<kWidth>;
  u32 smem;
  u32 held[kHeld ? Of::kFeatures / 16 : 1][kRowBlocks][4];

  __device__ __forceinline__ void begin(const u16* rows) {
    const int lane = threadIdx.x % 32;
    smem = smem_address(rows + Of::at(first_row() + lane % 16, lane / 16 * 8));
  }
  __device__ __forceinline__ void read(int d, u32 (&a)[kRowBlocks][4]) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = held[d / 16][m][i];
      }
    } else {
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) ldmatrix_x4(a[m], Of::along(smem + 2 * 16 * m * Of::kStride, d));
    }
  }
  __device__ __forceinline__ void hold() {
    if constexpr (kHeld) {
#pragma unroll
      for (int d = 0; d < Of::kFeatures; d += 16) {
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          ldmatrix_x4(held[d / 16][m], Of::along(smem + 2 * 16 * m * Of::kStride, d));
        }
      }
    }
  }
  // Straight from device memory: `row_of(i)` is row i of the warp.
  template <class RowOf>
  __device__ __forceinline__ void load(const RowOf& row_of) {
    static_assert(kHeld);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const TensorRow row = row_of(16 * m + 8 * half + lane / 4);
#pragma unroll
        for (int d = 0; d < Of::kFeatures; d += 8) {
          held[d / 16][m][d % 16 / 4 + half] = row.exists ? load_two<kWidth>(row.data, d + 2 * (lane % 4)) : 0;
        }
      }
    }
  }

  // scores[row][column] += resident[row] . columns[column], columns from 16 n on, whose rows lie `ahead` of `columns`: what
  // two tiles have in common of their addresses is worked out once.
  template <int kColumns>
  __device__ __forceinline__ void dot(const u16* columns, int ahead, const MetRows& rows, int n,
                                      Scores<kColumns>& scores) const {
    const int lane = threadIdx.x % 32;
    // Two blocks of 8 columns: columns lane % 8 + 8 (lane / 16), features of 8.
    const int of_lane = lane % 8 + lane / 16 * 8, first = lane / 8 % 2 * 8;
    const auto visit = [&](const u32(&a)[kRowBlocks][4], u32 address, int j, int d) {
      u32 c[4];
      ldmatrix_x4(c, Of::along(address, d) + 2 * ahead);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        Half::mma(scores.at[m][2 * j], a[m], c[0], c[1]);
        Half::mma(scores.at[m][2 * j + 1], a[m], c[2], c[3]);
      }
    };
    if constexpr (kGathers) {  // many addresses
#pragma unroll
      for (int j = 0; j < kColumns / 16; ++j) {
        const u32 address = smem_address(columns + Of::at(rows.row(n + j, of_lane), first));
#pragma unroll
        for (int d = 0; d < Of::kFeatures; d += 16) {
          u32 a[kRowBlocks][4];
          read(d, a);
          visit(a, address, j, d);
        }
      }
    } else {
      const u32 address = smem_address(columns + Of::at(rows.row(n, of_lane), first));
#pragma unroll
      for (int d = 0; d < Of::kFeatures; d += 16) {
        u32 a[kRowBlocks][4];
        read(d, a);
#pragma unroll
        for (int j = 0; j < kColumns / 16; ++j) visit(a, address + 2 * 16 * j * Of::kStride, j, d);
      }
    }
  }
};

// sums[row][f] += weights[row][column] * columns[column][first + f], columns from 16 n on of rows of `kWidth` features; they
// lie `ahead` of `columns`.
template <int kWidth, int kColumns, int kFeatures>
__device__ __forceinline__ void add(const Weights<kColumns>& weights, const u16* columns, int ahead,
                                    const MetRows& rows, int n, int first, Sums<kFeatures>& sums) {
  using Of = Layout<kWidth>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kColumns / 16; ++j) {
    const u32 address = kGathers ? smem_address(columns + Of::at(rows.row(n + j, lane % 16), lane / 16 * 8))
                                 : smem_address(columns + Of::at(rows.row(n, lane % 16), lane / 16 * 8 + first)) +
                                       2 * 16 * j * Of::kStride;
#pragma unroll
    for (int f = 0; f < kFeatures / 8; f += 2) {
      u32 c[4];
      ldmatrix_x4_trans(c, Of::along(address, 8 * f) + 2 * ahead);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        Half::mma(sums.at[m][f], weights.at[j][m], c[0], c[1]);
        Half::mma(sums.at[m][f + 1], weights.at[j][m], c[2], c[3]);
      }
    }
  }
}

// Sums * factor of a row of the calling lane, as they are stored.
template <int kFeatures>
__device__ __forceinline__ void pack_row(const Sums<kFeatures>& sums, int m, int half, float factor,
                                         u32 (&two)[kFeatures / 8]) {
#pragma unroll
  for (int f = 0; f < kFeatures / 8; ++f) {
    two[f] = Half::pack(sums.at[m][f][2 * half] * factor, sums.at[m][f][2 * half + 1] * factor);
  }
}

}  // namespace vicus::gpu
