// What hides keys from the rows of a warpgroup. A thread has rows `lane / 4` and 8 more of the 16 rows of its warp, and of
// every 8 keys the two at 2 (lane % 4).
#pragma once

#include "sm90.cuh"
#include "walk.cuh"

namespace vicus::gpu {

constexpr int kMask32 = (kKeys + 31) / 32;

// 32 bits of `words` from bit `first` on, zeros outside. `first` must be known when compiled.
template <int kCount>
__device__ __forceinline__ u32 bits_from(const u32 (&words)[kCount], int first) {
  if (first <= -32 || first >= 32 * kCount) return 0;
  if (first < 0) return words[0] << -first;
  const u32 high = first / 32 + 1 < kCount ? words[first / 32 + 1] : 0;
  return first % 32 == 0 ? words[first / 32] : __funnelshift_r(words[first / 32], high, first % 32);
}

// Bits [begin, end).
template <int kCount>
__device__ __forceinline__ void set_bits(u32 (&words)[kCount], int begin, int end) {
#pragma unroll
  for (int w = 0; w < kCount; ++w) words[w] = bits_below(end - 32 * w) & ~bits_below(begin - 32 * w);
}

// The first kPeriod bits, again and again.
template <int kPeriod, int kFrom, int kTo>
__device__ __forceinline__ void repeat_bits(const u32 (&from)[kFrom], u32 (&to)[kTo]) {
  if constexpr (32 % kPeriod == 0) {
    u32 ones = 0;
#pragma unroll
    for (int bit = 0; bit < 32; bit += kPeriod) ones |= 1u << bit;
#pragma unroll
    for (int w = 0; w < kTo; ++w) to[w] = from[0] * ones;
  } else {
#pragma unroll
    for (int w = 0; w < kTo; ++w) {
      to[w] = 0;
#pragma unroll
      for (int first = 0; first < 32 * kTo; first += kPeriod) to[w] |= bits_from(from, 32 * w - first);
    }
  }
}

// Bit c is set when key c of the tile at `origin` is seen: bits of a line, for every line, for every plane.
__device__ __forceinline__ void see_keys(const Span (&seen)[kRank], const Position& origin, u32 (&mask)[kMask32]) {
  int begin[3], end[3];
  for (int a = kFirstAxis; a < 3; ++a) {
    begin[a] = geometry::lo(geometry::hi(seen[a - kFirstAxis].begin - origin.at[a], 0), kTileKv[a]);
    end[a] = geometry::lo(geometry::hi(seen[a - kFirstAxis].end - origin.at[a], 0), kTileKv[a]);
  }
  constexpr int kLine = kTileKv[2], kPlane = kTileKv[1] * kTileKv[2];
  if constexpr (kRank == 1) {
    set_bits(mask, begin[2], end[2]);
  } else {
    u32 line[(kLine + 31) / 32], plane[(kPlane + 31) / 32], part[kMask32];
    set_bits(line, begin[2], end[2]);
    repeat_bits<kLine>(line, plane);
    u32 lines[(kPlane + 31) / 32];
    set_bits(lines, begin[1] * kLine, end[1] * kLine);
#pragma unroll
    for (int w = 0; w < (kPlane + 31) / 32; ++w) plane[w] &= lines[w];
    repeat_bits<kPlane>(plane, mask);
    if constexpr (kRank == 3) {
      set_bits(part, begin[0] * kPlane, end[0] * kPlane);
#pragma unroll
      for (int w = 0; w < kMask32; ++w) mask[w] &= part[w];
    }
  }
}

// Tiles are as wide as what the queries of a block see along the last axis: all hide the same columns.
constexpr bool kSameColumns = kRank > 1 && kStep[2] == 1 && kTileKv[2] >= kWindow[2] + kTileQ[2] - 1;

// By what the rows of the thread see, the first and the other one. A tile of additional tokens has them in a row, and every
// query sees them.
struct ThreadMask {
  u32 row[2][kMask32];  // bit 8 n + i: of the thread's key i of the n-th 8
};
__device__ __forceinline__ void see_keys(const Span (&first)[kRank], const Span (&other)[kRank], const KeyWalk& walk,
                                         int additional, ThreadMask& mask) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (kAdditional && walk.additional) set_bits(mask.row[half], 0, additional - walk.origin.at[2]);
    else see_keys(half == 0 ? first : other, walk.origin, mask.row[half]);
#pragma unroll
    for (int w = 0; w < kMask32; ++w) {
      mask.row[half][w] >>= 2 * (lane % 4);
      asm volatile("" : "+r"(mask.row[half][w]));  // here, not where it is used
    }
  }
}

// Of all tiles that are not of additional tokens, where they begin at column `origin`.
__device__ __forceinline__ void see_columns(const Span (&first)[kRank], const Span (&other)[kRank], int origin,
                                            ThreadMask& columns) {
  constexpr int kLine = kTileKv[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Span& seen = (half == 0 ? first : other)[kRank - 1];
    u32 line[(kLine + 31) / 32];
    set_bits(line, geometry::hi(seen.begin - origin, 0), geometry::lo(seen.end - origin, kLine));
    repeat_bits<kLine>(line, columns.row[half]);
#pragma unroll
    for (int w = 0; w < kMask32; ++w) {
      columns.row[half][w] = (columns.row[half][w] & bits_below(kKeys - 32 * w)) >> 2 * (threadIdx.x % 4);
    }
  }
}
// As see_keys, of those columns.
__device__ __forceinline__ void see_lines(const Span (&first)[kRank], const Span (&other)[kRank],
                                          const Position& origin, const ThreadMask& columns, ThreadMask& mask) {
  constexpr int kLine = kTileKv[2], kPlane = kTileKv[1] * kLine;
  const int shift = 2 * (threadIdx.x % 4);
  const auto in_tile = [&](const Span& seen, int a) {
    return Span{geometry::lo(geometry::hi(seen.begin - origin.at[a], 0), kTileKv[a]),
                geometry::lo(geometry::hi(seen.end - origin.at[a], 0), kTileKv[a])};
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Span(&seen)[kRank] = half == 0 ? first : other;
    const Span lines = in_tile(seen[kRank - 2], 1);
    u32 bits[kMask32];
    if constexpr (kTileKv[0] == 1) {
      set_bits(bits, lines.begin * kLine - shift, lines.end * kLine - shift);
    } else {
      u32 plane[(kPlane + 31) / 32];
      set_bits(plane, lines.begin * kLine, lines.end * kLine);
      repeat_bits<kPlane>(plane, bits);
#pragma unroll
      for (int w = 0; w < kMask32; ++w) bits[w] >>= shift;
    }
    if constexpr (kRank == 3) {
      const Span planes = in_tile(seen[0], 0);
      u32 part[kMask32];
      set_bits(part, planes.begin * kPlane - shift, planes.end * kPlane - shift);
#pragma unroll
      for (int w = 0; w < kMask32; ++w) bits[w] &= part[w];
    }
#pragma unroll
    for (int w = 0; w < kMask32; ++w) {
      mask.row[half][w] = columns.row[half][w] & bits[w];
      asm volatile("" : "+r"(mask.row[half][w]));  // here, not where it is used
    }
  }
}

// The same on two axes: lines that the rows see, in keys of the walk from a tile on, whose columns come before those.
struct ThreadLines {
  int begin[2], end[2];

  // From the first tile, which begins at line `origin`.
  __device__ __forceinline__ ThreadLines(const Span& first, const Span& other, int origin) {
    const int shift = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Span& seen = half == 0 ? first : other;
      begin[half] = (seen.begin - origin) * kTileKv[2] - shift;
      end[half] = geometry::hi(seen.end - origin, 0) * kTileKv[2] - shift;
    }
  }
  __device__ __forceinline__ void next() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      begin[half] -= kKeys;
      end[half] -= kKeys;
    }
  }
  __device__ __forceinline__ void see(const ThreadMask& columns, ThreadMask& mask) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 bits[kMask32];
      set_bits(bits, begin[half], end[half]);
#pragma unroll
      for (int w = 0; w < kMask32; ++w) {
        mask.row[half][w] = columns.row[half][w] & bits[w];
        asm volatile("" : "+r"(mask.row[half][w]));  // here, not where it is used
      }
    }
  }
};

// Whether any row of the warp sees a key of the tile.
__device__ __forceinline__ bool sees_any(const ThreadMask& mask) {
  u32 any = 0;
#pragma unroll
  for (int w = 0; w < kMask32; ++w) any |= mask.row[0][w] | mask.row[1][w];
  return __any_sync(~0u, any != 0);
}

__device__ __forceinline__ void hide_keys(const ThreadMask& mask, float hidden, float (&scores)[kKeys / 2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if ((mask.row[half][n / 4] >> (8 * n % 32 + i) & 1) == 0) scores[4 * n + 2 * half + i] = hidden;
      }
    }
  }
}

}  // namespace vicus::gpu
