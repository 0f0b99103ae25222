// Products of tiles in shared memory without tensor cores, for every storage type: C threads of a warp along the columns,
// R along the rows, each with kThreadRows x kThreadCols results in registers.
//
// A warp owns 4 * kThreadRows rows. Lane l works on rows 4 i + l / 8 of them and on columns 8 j + l % 8: 16-byte reads of
// eight rows with 16 bytes of padding meet no bank twice. Weights (probabilities, gradients of logits) go from the first
// product to the second through rows of shared memory that only their own warp touches.
//
// Constants of the prologue: kWarps, kThreadRows, kDepth (columns of a tile in a first product), kWide (in a second).
#pragma once

#include "plain_elements.cuh"

namespace vicus::gpu {

constexpr int kThreads = kWarps * 32;
constexpr int kRowLanes = 4, kColLanes = 8;
constexpr int kWarpRows = kRowLanes * kThreadRows;
constexpr int kRows = kWarps * kWarpRows;
constexpr int kPad = kVec;
constexpr int kWideGroups = kWide / (kColLanes * kVec);  // vectors of one thread in a row of results

static_assert(kDepth % (2 * kVec) == 0 && kWide % (kColLanes * kVec) == 0 && kDepth % kPiece == 0);

__device__ __forceinline__ int row_of(int i) {  // result i of this thread
  return threadIdx.x / 32 * kWarpRows + kRowLanes * i + threadIdx.x % 32 / kColLanes;
}
__device__ __forceinline__ int col_of(int j) { return kColLanes * j + threadIdx.x % kColLanes; }
__device__ __forceinline__ int wide_of(int g) { return (kColLanes * g + threadIdx.x % kColLanes) * kVec; }

template <int kBytes>
__device__ __forceinline__ void cp_async_small(u32 smem, const void* global, bool present) {
  const int bytes = present ? kBytes : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem), "l"(global), "n"(kBytes), "r"(bytes)
               : "memory");
}

// Columns [first, first + kColumns) of kCount rows of `kWidth` values to smem, a row every kColumns + kPad. Where
// `offset_of(c, offset)` is false or the row has ended, zeros.
template <int kCount, int kColumns, int kWidth, class OffsetOf>
__device__ __forceinline__ void load_tile(const void* data, int first, const OffsetOf& offset_of, Acc* smem) {
  constexpr int kPieces = kColumns / kPiece;
  const Storage* values = static_cast<const Storage*>(data);
#pragma unroll 1  // costs registers, and cp.async waits for nothing
  for (int index = threadIdx.x; index < kCount * kPieces; index += kThreads) {
    const int c = index / kPieces, column = index % kPieces * kPiece;
    long long offset = 0;
    const bool present = first + column < kWidth && offset_of(c, offset);
    Acc* to = smem + c * (kColumns + kPad) + column;
    const Storage* from = values + (present ? offset + first + column : 0);
    if constexpr (sizeof(Storage) == sizeof(Acc)) {
      if constexpr (kVectors) cp_async_16(smem_address(to), from, present);
      else cp_async_small<sizeof(Acc)>(smem_address(to), from, present);
    } else {
      Acc v[kPiece] = {};
      if (present) load_values(from, v);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) to[i] = v[i];
    }
  }
}

// sums[i][j] += a[row i] . b[column j] over kDepth values.
template <int kThreadCols>
__device__ __forceinline__ void multiply_rows(const Acc* a, const Acc* b, Acc (&sums)[kThreadRows][kThreadCols]) {
  constexpr int kStride = kDepth + kPad;
  const Acc* const row = a + row_of(0) * kStride;
  const Acc* const col = b + col_of(0) * kStride;
#pragma unroll 2
  for (int d = 0; d < kDepth; d += kVec) {
    Acc x[kThreadRows][kVec];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) load_values(row + kRowLanes * i * kStride + d, x[i]);
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) {
      Acc y[kVec];
      load_values(col + kColLanes * j * kStride + d, y);
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) sums[i][j] += x[i][v] * y[v];
      }
    }
  }
}

// A weight of a pair that is not seen, where zero times what lies there would not be zero.
template <class T>
__device__ __forceinline__ T hidden_weight();
template <>
__device__ __forceinline__ float hidden_weight<float>() {
  return __int_as_float(0x7fc0dead);
}
template <>
__device__ __forceinline__ double hidden_weight<double>() {
  return __longlong_as_double(0x7ff8deaddeaddeadll);
}
__device__ __forceinline__ bool is_hidden(float x) { return __float_as_int(x) == 0x7fc0dead; }
__device__ __forceinline__ bool is_hidden(double x) { return __double_as_longlong(x) == 0x7ff8deaddeaddeadll; }

// Results of a second product: row i, vector g, value x is column wide_of(g) + x.
struct WideSums {
  Acc at[kThreadRows][kWideGroups][kVec];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int g = 0; g < kWideGroups; ++g) {
        for (int x = 0; x < kVec; ++x) at[i][g][x] = 0;
      }
    }
  }
  __device__ __forceinline__ bool all_finite() const {
    bool good = true;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int g = 0; g < kWideGroups; ++g) {
        for (int x = 0; x < kVec; ++x) good = good && finite(at[i][g][x]);
      }
    }
    return good;
  }
  __device__ __forceinline__ void scale_row(int i, Acc factor) {
#pragma unroll
    for (int g = 0; g < kWideGroups; ++g) {
      for (int x = 0; x < kVec; ++x) at[i][g][x] *= factor;
    }
  }
  // Row i to a row of the caller's tensor, columns from `first`.
  template <int kWidth>
  __device__ __forceinline__ void store_row(int i, Storage* row, int first) const {
#pragma unroll
    for (int g = 0; g < kWideGroups; ++g) {
      const int column = first + wide_of(g);
      if (column >= kWidth) continue;
      if constexpr (kVectors) {
        store_values(row + column, at[i][g]);
      } else {
#pragma unroll
        for (int x = 0; x < kVec; ++x) {
          if (column + x < kWidth) row[column + x] = Values::store(at[i][g][x]);
        }
      }
    }
  }
};

template <int kThreadCols>
struct Weights {
  static constexpr int kCols = kThreadCols * kColLanes;
  static constexpr int kStride = kCols + kColLanes;
  Acc at[kRows * kStride];

  __device__ __forceinline__ void put(const Acc (&weights)[kThreadRows][kThreadCols]) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) at[row_of(i) * kStride + col_of(j)] = weights[i][j];
    }
  }

  // sums[row][f] += weight[row][c] * values[c][f]. With `careful`, hidden weights are left out.
  __device__ __forceinline__ void multiply(const Acc* values, bool careful, WideSums& sums) const {
    constexpr int kValueStride = kWide + kPad;
    const Acc* const row = at + row_of(0) * kStride;
    const Acc* const value = values + wide_of(0);
    if (careful) {
#pragma unroll 1
      for (int c = 0; c < kCols; ++c) {
#pragma unroll
        for (int g = 0; g < kWideGroups; ++g) {
          Acc y[kVec];
          load_values(value + c * kValueStride + kColLanes * kVec * g, y);
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
            const Acc w = row[kRowLanes * i * kStride + c];
            if (is_hidden(w)) continue;
            for (int x = 0; x < kVec; ++x) sums.at[i][g][x] += w * y[x];
          }
        }
      }
      return;
    }
#pragma unroll 2
    for (int c = 0; c < kCols; c += kVec) {
      Acc w[kThreadRows][kVec];
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) load_values(row + kRowLanes * i * kStride + c, w[i]);
#pragma unroll
      for (int u = 0; u < kVec; ++u) {
#pragma unroll
        for (int g = 0; g < kWideGroups; ++g) {
          Acc y[kVec];
          load_values(value + (c + u) * kValueStride + kColLanes * kVec * g, y);
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
            for (int x = 0; x < kVec; ++x) sums.at[i][g][x] += w[i][u] * y[x];
          }
        }
      }
    }
  }
};

}  // namespace vicus::gpu
