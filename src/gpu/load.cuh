// Rows of the caller's tensors to shared memory and registers, and back. Constants of the prologue: kVectors (rows start at
// multiples of 16 bytes and head dims are multiples of 8), kGathers (warps meet parts of tiles).
#pragma once

#include "tiles.cuh"

namespace vicus::gpu {

// Rows of `kWidth` features in shared memory, which must begin at a multiple of 128 bytes. What keeps ldmatrix free of bank
// conflicts: 16 bytes of padding, or, where small windows need the space, another order of the 16-byte pieces in each row.
template <int kWidth>
struct Layout {
  static constexpr int kFeatures = (kWidth + 15) / 16 * 16;
  static constexpr bool kReordered = kGathers && kFeatures % 64 == 0;
  static constexpr int kStride = kFeatures + (kReordered ? 0 : 8);
  // The element where 8 features from `column` on lie, a multiple of 8.
  static __device__ __forceinline__ int at(int row, int column) {
    return row * kStride + (kReordered ? column ^ row % 8 * 8 : column);
  }
  // From the address of features `column`, less than 16, to that of `column` + d, d a multiple of 16.
  static __device__ __forceinline__ u32 along(u32 address, int d) {
    return kReordered ? (address ^ 2 * (d % 64)) + 2 * (d / 64 * 64) : address + 2 * d;
  }
};

// Eight values of a row from column `first`, one by one; zeros after the end.
template <int kWidth>
__device__ __forceinline__ uint4 load_eight(const u16* row, int first) {
  u32 two[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 low = first + 2 * i < kWidth ? row[first + 2 * i] : 0;
    const u32 high = first + 2 * i + 1 < kWidth ? row[first + 2 * i + 1] : 0;
    two[i] = low | high << 16;
  }
  return {two[0], two[1], two[2], two[3]};
}

// Row c of `kCount` to shared memory, columns up to a multiple of 16; where `position(c, p)` is false, zeros.
template <int kCount, int kWidth, int kThreads, class PositionOf>
__device__ __forceinline__ void load_rows(const Rows& tensor, const Placed& placed, int head,
                                          const PositionOf& position, u16* smem) {
  constexpr int kChunks = (kWidth + 15) / 16 * 2;  // of 16 bytes
  const u16* data = static_cast<const u16*>(tensor.data);
#pragma unroll 4
  for (int first = 0; first < kCount * kChunks; first += kThreads) {
    const int index = first + static_cast<int>(threadIdx.x);
    if ((kCount * kChunks) % kThreads != 0 && index >= kCount * kChunks) break;
    const int c = index / kChunks, column = index % kChunks * 8;
    Position p;
    const bool present = position(c, p) && column < kWidth;
    u16* to = smem + Layout<kWidth>::at(c, column);
    if constexpr (kVectors) {
      const u16* row = data + (present ? placed.row(p, head) + column : 0);
      cp_async_16(smem_address(to), row, present);
    } else {
      *reinterpret_cast<uint4*>(to) =
          present ? load_eight<kWidth>(data + placed.row(p, head), column) : uint4{0, 0, 0, 0};
    }
  }
}

// Rows of a tensor, and where they go.
struct Load {
  const Rows& tensor;
  const Placed& placed;
  u16* smem;
};

// The rows of a box of kExtent1 by kExtent2 rows a plane that starts at `origin`, as load_rows, of tensors that have the
// same positions. Threads keep their column and step from row to row, so that positions cost additions only.
template <int kCount, int kExtent1, int kExtent2, int kWidth, int kThreads, int kTensors>
__device__ __forceinline__ void load_box(const Load (&loads)[kTensors], int head, const Position& origin,
                                         const int (&limits)[3]) {
  const Position limit = {{limits[0], limits[1], limits[2]}};  // read once, wherever they are
  constexpr int kChunks = (kWidth + 15) / 16 * 2;              // of 16 bytes
  if constexpr (kVectors && kThreads % kChunks == 0) {
    constexpr int kStep = kThreads / kChunks;
    constexpr int kStep0 = kStep / (kExtent1 * kExtent2), kStep1 = kStep / kExtent2 % kExtent1,
                  kStep2 = kRank == 1 ? kStep : kStep % kExtent2;
    constexpr bool kSameOrder = !Layout<kWidth>::kReordered || kStep % 8 == 0;
    int c = static_cast<int>(threadIdx.x) / kChunks;
    const int column = static_cast<int>(threadIdx.x) % kChunks * 8;
    Position p = box_position<kExtent1, kExtent2>(origin, c);
    const u16* row[kTensors];
    long long advance[kTensors], carry1[kTensors], carry2[kTensors];  // to the next row; at the end of an axis
    u32 to[kTensors];
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
      const Placed& placed = loads[t].placed;
      row[t] = static_cast<const u16*>(loads[t].tensor.data) + placed.row(p, head) + column;
      to[t] = smem_address(loads[t].smem + Layout<kWidth>::at(c, column));
      advance[t] = kStep2 * placed.step[2];
      if constexpr (kRank > 1) {
        advance[t] += kStep1 * placed.step[1];
        carry2[t] = placed.step[1] - kExtent2 * placed.step[2];
      }
      if constexpr (kRank > 2) {
        advance[t] += kStep0 * placed.step[0];
        carry1[t] = placed.step[0] - kExtent1 * placed.step[1];
      }
    }
    // Wide sums, biases and parts of tiles leave no registers for more.
    constexpr int kUnroll = kWidth > 128 || kBiasKind != 0 ? 1 : kGathers && kStages > 1 ? 2 : 4;
#pragma unroll kUnroll
    for (; c < kCount; c += kStep) {
      bool present = kWidth % 16 == 0 || column < kWidth;
      for (int a = kFirstAxis; a < 3; ++a) present = present & (p.at[a] < limit.at[a]);
#pragma unroll
      for (int t = 0; t < kTensors; ++t) {
        cp_async_16(to[t], row[t], present);  // without a row nothing is read
        if constexpr (kSameOrder) to[t] += 2 * kStep * Layout<kWidth>::kStride;
        else to[t] = smem_address(loads[t].smem + Layout<kWidth>::at(c + kStep, column));
        row[t] += advance[t];
      }
      p.at[2] += kStep2;
      if constexpr (kRank > 1) {
        p.at[1] += kStep1;
        if (p.at[2] >= origin.at[2] + kExtent2) {
          p.at[2] -= kExtent2;
          ++p.at[1];
#pragma unroll
          for (int t = 0; t < kTensors; ++t) row[t] += carry2[t];
        }
      }
      if constexpr (kRank > 2) {
        p.at[0] += kStep0;
        if (p.at[1] >= origin.at[1] + kExtent1) {
          p.at[1] -= kExtent1;
          ++p.at[0];
#pragma unroll
          for (int t = 0; t < kTensors; ++t) row[t] += carry1[t];
        }
      }
    }
  } else {
    const auto row = [&](int c, Position& p) {
      p = box_position<kExtent1, kExtent2>(origin, c);
      bool inside = true;
      for (int a = kFirstAxis; a < 3; ++a) inside = inside && p.at[a] < limit.at[a];
      return inside;
    };
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
      load_rows<kCount, kWidth, kThreads>(loads[t].tensor, loads[t].placed, head, row, loads[t].smem);
    }
  }
}

// The rows of a query tile.
template <int kCount, int kWidth, int kThreads>
__device__ __forceinline__ void load_query_rows(const Rows& tensor, const Placed& placed, const QueryTile& tile,
                                                u16* smem) {
  constexpr int kChunks = (kWidth + 15) / 16 * 2;
  const u16* data = static_cast<const u16*>(tensor.data);
#pragma unroll 4
  for (int first = 0; first < kCount * kChunks; first += kThreads) {
    const int index = first + static_cast<int>(threadIdx.x);
    if ((kCount * kChunks) % kThreads != 0 && index >= kCount * kChunks) break;
    const int r = index / kChunks, column = index % kChunks * 8;
    const Position p = row_position(tile, r);
    const bool present = row_exists(tile, r, p) && column < kWidth;
    u16* to = smem + Layout<kWidth>::at(r, column);
    if constexpr (kVectors) {
      const u16* row = data + (present ? placed.row(p, tile.head + r / kPositions) + column : 0);
      cp_async_16(smem_address(to), row, present);
    } else {
      *reinterpret_cast<uint4*>(to) =
          present ? load_eight<kWidth>(data + placed.row(p, tile.head + r / kPositions), column) : uint4{0, 0, 0, 0};
    }
  }
}

// A row of a tensor; `data` may be anything where there is none. No branches: loads of several are on their way together.
struct TensorRow {
  const u16* data;
  bool exists;
};

// Row r of a tile of queries.
__device__ __forceinline__ TensorRow query_row(const Rows& tensor, const Placed& placed, const QueryTile& tile, int r) {
  const Position p = row_position(tile, r);
  return {static_cast<const u16*>(tensor.data) + placed.row(p, tile.head + r / kPositions), row_exists(tile, r, p)};
}

// Features `first` and the next of a row.
template <int kWidth>
__device__ __forceinline__ u32 load_two(const u16* row, int first) {
  if constexpr (kVectors) {
    return kWidth % 16 == 0 || first < kWidth ? *reinterpret_cast<const u32*>(row + first) : 0;
  } else {
    const u32 low = first < kWidth ? row[first] : 0, high = first + 1 < kWidth ? row[first + 1] : 0;
    return low | high << 16;
  }
}

// Of a row whose four lanes hold columns 8 f + 2 (lane % 4) and the next of blocks f, the first of which is column `first`:
// to device memory, 32 bytes at a time. All lanes of the warp call it.
template <int kWidth, int kBlocks>
__device__ __forceinline__ void store_row(u16* row, bool exists, int first, const u32 (&two)[kBlocks]) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane % 2 != 0;
  uint2 four[kBlocks / 2];
#pragma unroll
  for (int f = 0; f < kBlocks; f += 2) {
    const u32 given = __shfl_xor_sync(~0u, odd ? two[f] : two[f + 1], 1);
    four[f / 2] = odd ? uint2{given, two[f + 1]} : uint2{two[f], given};
  }
  if (!exists) return;
#pragma unroll
  for (int f = 0; f < kBlocks; f += 2) {
    const int column = first + 8 * (f + lane % 2) + lane % 4 / 2 * 4;
    if (kWidth % 16 != 0 && column >= kWidth) continue;
    if constexpr (kVectors) {
      *reinterpret_cast<uint2*>(row + column) = four[f / 2];
    } else {
      const uint2 values = four[f / 2];
      for (int i = 0; i < 4; ++i) {
        if (column + i < kWidth) row[column + i] = static_cast<u16>((i < 2 ? values.x : values.y) >> (i % 2 * 16));
      }
    }
  }
}

}  // namespace vicus::gpu
