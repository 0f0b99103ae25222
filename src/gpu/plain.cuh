// Products of tiles in shared memory, for every storage type: C lanes of a warp along the columns, R along the rows, each
// with kLaneRows x kLaneCols results in registers.
//
// float64 is multiplied as it is. float32 goes through tensor cores: each operand is the sum of two values of 11 bits
// (tf32), and three of the four products of those are added, which leaves out what is below 2^-22 of a product. Lanes hold
// results as `mma_tf32` does; features and columns go to its products in whatever order makes reads of shared memory wide
// and free of conflicts, which they are with rows that are 8 values apart from a multiple of 32.
//
// A warp owns 4 * kThreadRows rows. Weights (probabilities, gradients of logits) go from the first product to the second
// through rows of shared memory that only their own warp touches.
//
// Constants of the prologue: kWarps, kThreadRows, kDepth (columns of a tile in a first product), kWide (in a second).
#pragma once

#include "plain_elements.cuh"

namespace vicus::gpu {

constexpr bool kTensorCores = sizeof(Acc) == sizeof(float);
constexpr int kThreads = kWarps * 32;
constexpr int kColLanes = kTensorCores ? 4 : 8, kRowLanes = 32 / kColLanes;
constexpr int kWarpRows = 4 * kThreadRows;
constexpr int kLaneRows = kWarpRows / kRowLanes;
constexpr int kRows = kWarps * kWarpRows;
constexpr int kPad = kTensorCores ? 8 : kVec;
constexpr int kWideGroups = kWide / (kColLanes * kVec);  // vectors of one lane in a row of results

static_assert(kDepth % (2 * kVec) == 0 && kWide % (kColLanes * kVec) == 0 && kDepth % kPiece == 0);
static_assert(!kTensorCores || (kDepth % 8 == 0 && kWide % 32 == 0 && kWarpRows % 16 == 0));

__device__ __forceinline__ int row_of(int i) {  // result i of this lane
  return threadIdx.x / 32 * kWarpRows + kRowLanes * i + threadIdx.x % 32 / kColLanes;
}
__device__ __forceinline__ int col_of(int j) {
  if constexpr (kTensorCores) return 8 * (j / 2) + 2 * (threadIdx.x % 4) + j % 2;
  else return kColLanes * j + threadIdx.x % kColLanes;
}
__device__ __forceinline__ int wide_of(int g) {
  if constexpr (kTensorCores) return 32 * (g / 2) + 8 * (threadIdx.x % 4) + 4 * (g % 2);
  else return (kColLanes * g + threadIdx.x % kColLanes) * kVec;
}

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

// A value as the sum of two of 11 bits. What follows those bits in the high half does not count in a product.
struct Halves {
  u32 high, low;
};
__device__ __forceinline__ Halves halves_of(float x) {
  const u32 rounded = __float_as_uint(x) + 0x1000;
  return {rounded, __float_as_uint(x - __uint_as_float(rounded & 0xffffe000))};
}

// Sums of products of halves: of both high ones, and of a high and a low one. Tensor cores round towards zero: products
// 2^-11 as large would cost the sums of the others two roundings more.
template <int kLaneCols>
struct HalfSums {
  float high[kLaneRows][kLaneCols] = {}, low[kLaneRows][kLaneCols] = {};

  // Adds a . b for eight columns from 8 n and eight features: `a` has two features of each row of the lane, `b` those of
  // column l / 4, and the results are of columns 2 (l % 4) and the next.
  __device__ __forceinline__ void add(const Halves (&a)[kLaneRows][2], const Halves (&b)[2], int n) {
#pragma unroll
    for (int i = 0; i < kLaneRows; i += 2) {
      const Halves(&top)[2] = a[i], (&bottom)[2] = a[i + 1];
      mma_tf32(low[i][2 * n], low[i][2 * n + 1], low[i + 1][2 * n], low[i + 1][2 * n + 1], top[0].low, bottom[0].low,
               top[1].low, bottom[1].low, b[0].high, b[1].high);
      mma_tf32(low[i][2 * n], low[i][2 * n + 1], low[i + 1][2 * n], low[i + 1][2 * n + 1], top[0].high, bottom[0].high,
               top[1].high, bottom[1].high, b[0].low, b[1].low);
      mma_tf32(high[i][2 * n], high[i][2 * n + 1], high[i + 1][2 * n], high[i + 1][2 * n + 1], top[0].high,
               bottom[0].high, top[1].high, bottom[1].high, b[0].high, b[1].high);
    }
  }
};

// sums[i][j] += a[row i] . b[column j] over kDepth values. With `careful`, one by one: an infinite value has no halves.
template <int kLaneCols>
__device__ __forceinline__ void multiply_rows(const Acc* a, const Acc* b, bool careful,
                                              Acc (&sums)[kLaneRows][kLaneCols]) {
  constexpr int kStride = kDepth + kPad;
  const Acc* const row = a + row_of(0) * kStride;
  if (kTensorCores && !careful) {
    const int pair = 2 * (threadIdx.x % 4);
    const Acc* const col = b + threadIdx.x % 32 / 4 * kStride;
    HalfSums<kLaneCols> halves;
#pragma unroll 1
    for (int d = pair; d < kDepth; d += 8) {
      Halves x[kLaneRows][2];
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
        const float2 both = *reinterpret_cast<const float2*>(row + kRowLanes * i * kStride + d);
        x[i][0] = halves_of(both.x), x[i][1] = halves_of(both.y);
      }
#pragma unroll
      for (int n = 0; n < kLaneCols / 2; ++n) {
        const float2 both = *reinterpret_cast<const float2*>(col + 8 * n * kStride + d);
        halves.add(x, {halves_of(both.x), halves_of(both.y)}, n);
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
      for (int j = 0; j < kLaneCols; ++j) sums[i][j] += halves.high[i][j] + halves.low[i][j];
    }
    return;
  }
  const Acc* const col = b + col_of(0) * kStride;
#pragma unroll(kTensorCores ? 1 : 2)
  for (int d = 0; d < kDepth; d += kVec) {
    Acc x[kLaneRows][kVec];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) load_values(row + kRowLanes * i * kStride + d, x[i]);
#pragma unroll
    for (int j = 0; j < kLaneCols; ++j) {
      Acc y[kVec];
      load_values(col + (col_of(j) - col_of(0)) * kStride + d, y);
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
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
  Acc at[kLaneRows][kWideGroups][kVec];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
      for (int g = 0; g < kWideGroups; ++g) {
        for (int x = 0; x < kVec; ++x) at[i][g][x] = 0;
      }
    }
  }
  __device__ __forceinline__ bool all_finite() const {
    bool good = true;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
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

template <int kLaneCols>
struct Weights {
  static constexpr int kCols = kLaneCols * kColLanes;
  static constexpr int kStride = kCols + (kTensorCores ? 4 : kColLanes);
  Acc at[kRows * kStride];

  __device__ __forceinline__ void put(const Acc (&weights)[kLaneRows][kLaneCols]) {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
      for (int j = 0; j < kLaneCols; ++j) at[row_of(i) * kStride + col_of(j)] = weights[i][j];
    }
  }

  // sums[row][f] += weight[row][c] * values[c][f]. With `careful`, hidden weights are left out.
  __device__ __forceinline__ void multiply(const Acc* values, bool careful, WideSums& sums) const {
    if (careful) one_by_one(values, sums);
    else if constexpr (kTensorCores) with_tensor_cores(values, sums);
    else with_vectors(values, sums);
  }

 private:
  static constexpr int kValueStride = kWide + kPad;

  __device__ __forceinline__ const Acc* row() const { return at + row_of(0) * kStride; }

  __device__ __forceinline__ void one_by_one(const Acc* values, WideSums& sums) const {
#pragma unroll 1
    for (int c = 0; c < kCols; ++c) {
#pragma unroll
      for (int g = 0; g < kWideGroups; ++g) {
        Acc y[kVec];
        load_values(values + c * kValueStride + wide_of(g), y);
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
          const Acc w = row()[kRowLanes * i * kStride + c];
          if (is_hidden(w)) continue;
          for (int x = 0; x < kVec; ++x) sums.at[i][g][x] += w * y[x];
        }
      }
    }
  }

  __device__ __forceinline__ void with_vectors(const Acc* values, WideSums& sums) const {
#pragma unroll 2
    for (int c = 0; c < kCols; c += kVec) {
      Acc w[kLaneRows][kVec];
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) load_values(row() + kRowLanes * i * kStride + c, w[i]);
#pragma unroll
      for (int u = 0; u < kVec; ++u) {
#pragma unroll
        for (int g = 0; g < kWideGroups; ++g) {
          Acc y[kVec];
          load_values(values + (c + u) * kValueStride + wide_of(g), y);
#pragma unroll
          for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
            for (int x = 0; x < kVec; ++x) sums.at[i][g][x] += w[i][u] * y[x];
          }
        }
      }
    }
  }

  // 32 features at a time, of which lane l loads four from 4 (l / 4). Sums of one tile begin at 0 and are added to those
  // before it as float32 values are, rounded to nearest: long sums would show the other rounding.
  __device__ __forceinline__ void with_tensor_cores(const Acc* values, WideSums& sums) const {
    const int c = threadIdx.x % 4;
    const Acc* const value = values + c * kValueStride + threadIdx.x % 32 / 4 * 4;
#pragma unroll
    for (int part = 0; part < kWide / 32; ++part) {
      HalfSums<8> halves;
#pragma unroll(kCols < 32 ? 1 : 2)
      for (int first = 0; first < kCols; first += 8) {
        Halves w[kLaneRows][2];
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
          for (int k = 0; k < 2; ++k) w[i][k] = halves_of(row()[kRowLanes * i * kStride + first + c + 4 * k]);
        }
        Acc y[2][kVec];
#pragma unroll
        for (int k = 0; k < 2; ++k) load_values(value + (first + 4 * k) * kValueStride + 32 * part, y[k]);
#pragma unroll
        for (int t = 0; t < 4; ++t) halves.add(w, {halves_of(y[0][t]), halves_of(y[1][t])}, t);
      }
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
        for (int t = 0; t < 8; ++t) sums.at[i][2 * part + t % 2][t / 2] += halves.high[i][t] + halves.low[i][t];
      }
    }
  }
};

}  // namespace vicus::gpu
