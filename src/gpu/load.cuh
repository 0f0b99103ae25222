// Rows of the caller's tensors to shared memory and back. Constants of the prologue: kVectors (rows start at multiples of
// 16 bytes and head dims are multiples of 8).
#pragma once

#include "tiles.cuh"

namespace vicus::gpu {

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

// Row c of `kCount` to smem[c * kStride], columns up to a multiple of 16; where `position(c, p)` is false, zeros.
template <int kCount, int kWidth, int kStride, int kThreads, class PositionOf>
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
    u16* to = smem + c * kStride + column;
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
template <int kCount, int kExtent1, int kExtent2, int kWidth, int kStride, int kThreads, int kTensors>
__device__ __forceinline__ void load_box(const Load (&loads)[kTensors], int head, const Position& origin,
                                         const int (&limit)[3]) {
  constexpr int kChunks = (kWidth + 15) / 16 * 2;  // of 16 bytes
  if constexpr (kVectors && kThreads % kChunks == 0) {
    constexpr int kStep = kThreads / kChunks;
    constexpr int kStep0 = kStep / (kExtent1 * kExtent2), kStep1 = kStep / kExtent2 % kExtent1,
                  kStep2 = kRank == 1 ? kStep : kStep % kExtent2;
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
      to[t] = smem_address(loads[t].smem) + 2 * (c * kStride + column);
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
    constexpr int kUnroll = kWidth > 128 || kBiasKind != 0 ? 1 : 4;  // wide sums and biases leave no registers for it
#pragma unroll kUnroll
    for (; c < kCount; c += kStep) {
      bool present = kWidth % 16 == 0 || column < kWidth;
      for (int a = kFirstAxis; a < 3; ++a) present = present && p.at[a] < limit[a];
#pragma unroll
      for (int t = 0; t < kTensors; ++t) {
        cp_async_16(to[t], present ? row[t] : loads[t].tensor.data, present);
        to[t] += 2 * kStep * kStride;
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
      for (int a = kFirstAxis; a < 3; ++a) inside = inside && p.at[a] < limit[a];
      return inside;
    };
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
      load_rows<kCount, kWidth, kStride, kThreads>(loads[t].tensor, loads[t].placed, head, row, loads[t].smem);
    }
  }
}

// The rows of a query tile.
template <int kCount, int kWidth, int kStride, int kThreads>
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
    u16* to = smem + r * kStride + column;
    if constexpr (kVectors) {
      const u16* row = data + (present ? placed.row(p, tile.head + r / kPositions) + column : 0);
      cp_async_16(smem_address(to), row, present);
    } else {
      *reinterpret_cast<uint4*>(to) =
          present ? load_eight<kWidth>(data + placed.row(p, tile.head + r / kPositions), column) : uint4{0, 0, 0, 0};
    }
  }
}

// The calling warp's `kCount` rows of a query tile, from row `first_row`.
template <int kWidth, int kStride, int kCount>
__device__ __forceinline__ void store_query_rows(const Rows& tensor, const Placed& placed, const QueryTile& tile,
                                                 const u16* smem, int first_row) {
  constexpr int kChunks = (kWidth + 7) / 8;
  u16* data = static_cast<u16*>(tensor.data);
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int index = lane; index < kCount * kChunks; index += 32) {
    const int r = first_row + index / kChunks, column = index % kChunks * 8;
    const Position p = row_position(tile, r);
    if (!row_exists(tile, r, p)) continue;
    u16* row = data + placed.row(p, tile.head + r / kPositions) + column;
    const u16* from = smem + r * kStride + column;
    if constexpr (kVectors) {
      *reinterpret_cast<uint4*>(row) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < 8; ++i) {
        if (column + i < kWidth) row[i] = from[i];
      }
    }
  }
}

}  // namespace vicus::gpu
