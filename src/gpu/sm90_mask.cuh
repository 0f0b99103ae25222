// What hides keys from the rows of a warpgroup. A thread has rows `lane / 4` and 8 more of the 16 rows of its warp, and of
// every eight keys of a tile the two at 2 (lane % 4).
#pragma once

#include "sm90_boxes.cuh"

namespace vicus::gpu {

constexpr int kEights = kKeys / 8;  // of a tile
/// Of words with a bit for each eight, the bit of the first one: seven bits of a byte become predicates together, but of the
/// lowest byte only six.
constexpr int kFirstBit = kEights <= 24 ? 8 : 0;
static_assert(kEights <= 32);

// What the rows of a thread, `lane / 4` and 8 more, see of a tile: of each eight, its key i. Bits of no eight are anything.
struct ThreadMask {
  u32 row[2][2];
};

// The bit of the first eight whose key i of this thread is not before key `end`, wherever that would be.
__device__ __forceinline__ int bit_of(int end, int i) {
  return (end + 8 * kFirstBit + 7 - i - 2 * static_cast<int>(threadIdx.x % 4)) >> 3;
}
__device__ __forceinline__ u32 keys_between(int begin, int end, int i) {
  return bits_below(bit_of(end, i)) & ~bits_below(bit_of(begin, i));
}

// The first kPeriod bits, again and again.
template <int kPeriod>
__device__ __forceinline__ u32 repeat_bits(u32 bits) {
  u32 ones = 0;
#pragma unroll
  for (int bit = 0; bit < 32; bit += kPeriod) ones |= 1u << bit;
  return bits * ones;
}

// Keys of some units of every kUnits, which have kUnit keys each: positions, lines or planes of a tile. `units` lie within
// [0, kUnits], but where those are the whole tile.
template <int kUnit, int kUnits>
__device__ __forceinline__ u32 keys_in(const Span& units, int i) {
  constexpr int kWhole = kUnit * kUnits;
  if (kUnit % 2 == 0) i = 0;  // the same for both of an eight
  if constexpr (kUnits == 1) {
    return 0u - static_cast<u32>((units.begin <= 0) & (units.end > 0));  // without a branch
  } else if constexpr (kWhole % 8 == 0 && kWhole > 8) {
    const u32 bits = keys_between(units.begin * kUnit, units.end * kUnit, i);
    return kWhole < kKeys ? repeat_bits<kWhole / 8>(bits) : bits;
  } else {
    constexpr int kShared = kWhole % 8 == 0 ? 8 : kWhole % 4 == 0 ? 4 : kWhole % 2 == 0 ? 2 : 1;  // factor
    constexpr int kPeriod = kWhole / kShared;                                                     // of eights
    // With three warpgroups, registers are too few to keep what is the same for all tiles.
    const u32 thread = kWarpgroups == 3 ? anew(threadIdx.x) : threadIdx.x;
    const int first = 2 * static_cast<int>(thread % 4) + i;
    u32 bits = 0;
#pragma unroll
    for (int n = 0; n < kPeriod && n < kEights; ++n) {
      const int at = (8 * n % kWhole + first) % kWhole;
      bits |= static_cast<u32>((units.begin * kUnit <= at) & (at < units.end * kUnit)) << (kFirstBit + n);
    }
    return kPeriod == 1 ? 0 - bits : kPeriod < kEights ? repeat_bits<kPeriod>(bits) : bits;
  }
}

// What a row sees along an axis, in a tile that begins at `origin`: along the first axis it may lie beyond.
__device__ __forceinline__ Span seen_in_tile(const Span& seen, const Position& origin, int a) {
  const int begin = seen.begin - origin.at[a], end = seen.end - origin.at[a];
  if (a == kFirstAxis) return {begin, end};
  return {geometry::lo(geometry::hi(begin, 0), kTileKv[a]), geometry::lo(geometry::hi(end, 0), kTileKv[a])};
}

// Rows of a box follow each other along the axes, the last one first: whether both rows of a thread, 8 apart, are at the same
// place along an axis.
constexpr int kLineRows = kTileHeads * box_extent(2), kPlaneRows = kLineRows * box_extent(1);
constexpr bool kSamePlace[3] = {8 % (kPlaneRows * box_extent(0)) == 0, 8 % kPlaneRows == 0, 8 % kLineRows == 0};

// What the rows see along the last axis, of tiles that begin at column `origin`.
__device__ __forceinline__ void see_columns(const Span (&first)[kRank], const Span (&other)[kRank],
                                            const Position& origin, ThreadMask& columns) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Span seen = seen_in_tile((half == 0 || kSamePlace[2] ? first : other)[kRank - 1], origin, 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) columns.row[half][i] = keys_in<1, kTileKv[2]>(seen, i);
  }
}

// Keys of the lines and planes that the rows see, of those that `mask` has.
__device__ __forceinline__ void see_lines(const Span (&first)[kRank], const Span (&other)[kRank],
                                          const Position& origin, ThreadMask& mask) {
  constexpr int kLine = kTileKv[2], kPlane = kTileKv[1] * kLine;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Span(&of_lines)[kRank] = half == 0 || kSamePlace[1] ? first : other;
    const Span(&of_planes)[kRank] = half == 0 || kSamePlace[0] ? first : other;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      u32& bits = mask.row[half][i];
      if constexpr (kRank > 1) bits &= keys_in<kLine, kTileKv[1]>(seen_in_tile(of_lines[kRank - 2], origin, 1), i);
      if constexpr (kRank > 2) bits &= keys_in<kPlane, kTileKv[0]>(seen_in_tile(of_planes[0], origin, 0), i);
      asm volatile("" : "+r"(bits));  // here, not where it is used
    }
  }
}

// The first `present` keys, by all rows.
__device__ __forceinline__ void see_present(int present, ThreadMask& mask) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) mask.row[half][i] = keys_between(0, present, i);
  }
}

// By what the rows of the thread see, the first and the other one. A tile of additional tokens has them in a row, and every
// query sees them.
__device__ __forceinline__ void see_keys(const Span (&first)[kRank], const Span (&other)[kRank], const KeyWalk& walk,
                                         int additional, ThreadMask& mask) {
  if (kAdditional && walk.additional) {
    see_present(additional - walk.origin.at[2], mask);
  } else {
    see_columns(first, other, walk.origin, mask);
    see_lines(first, other, walk.origin, mask);
  }
}

// Which lines of a tile that begins at `origin` a row sees, a bit each.
__device__ __forceinline__ u32 lines_of(const Span (&seen)[kRank], const Position& origin) {
  const auto within = [&](int a) {
    const Span& axis = seen[a - kFirstAxis];
    return bits_below(axis.end - origin.at[a]) & ~bits_below(axis.begin - origin.at[a]);
  };
  const u32 of_plane = within(1) & bits_below(kTileKv[1]);
  if constexpr (kRank == 2) return of_plane;
  const u32 planes = within(0) & bits_below(kTileKv[0]);
  if constexpr (kTileKv[1] == 1) return of_plane != 0 ? planes : 0;
  u32 lines = 0;
#pragma unroll
  for (int p = 0; p < kTileKv[0]; ++p) lines |= (planes >> p & 1) * (of_plane << p * kTileKv[1]);
  return lines;
}

// Tiles are as wide as what the queries of a block see along the last axis: all hide the same columns.
constexpr bool kSameColumns = kRank > 1 && kStep[2] == 1 && kTileKv[2] >= kWindow[2] + kTileQ[2] - 1;

// Lines that the rows see on two axes, in eights of the walk from a tile on, where those follow each other by lines.
struct ThreadLines {
  static constexpr int kKinds = kTileKv[2] % 2 == 0 ? 1 : 2;  // of keys of an eight
  int begin[2][kKinds], end[2][kKinds];

  // From the first tile, which begins at line `origin`.
  __device__ __forceinline__ ThreadLines(const Span& first, const Span& other, int origin) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Span& seen = half == 0 ? first : other;
#pragma unroll
      for (int i = 0; i < kKinds; ++i) {
        begin[half][i] = bit_of((seen.begin - origin) * kTileKv[2], i);
        end[half][i] = bit_of((seen.end - origin) * kTileKv[2], i);
      }
    }
  }
  __device__ __forceinline__ void next() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kKinds; ++i) {
        begin[half][i] -= kEights;
        end[half][i] -= kEights;
      }
    }
  }
  // Keys of those lines, of those that `mask` has.
  __device__ __forceinline__ void see(ThreadMask& mask) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int kind = kKinds == 1 ? 0 : i;
        mask.row[half][i] &= bits_below(end[half][kind]) & ~bits_below(begin[half][kind]);
        asm volatile("" : "+r"(mask.row[half][i]));  // here, not where it is used
      }
    }
  }
};

// Whether the thread's row `half` sees a key of the thread's.
__device__ __forceinline__ bool sees(const ThreadMask& mask, int half) {
  return ((mask.row[half][0] | mask.row[half][1]) & bits_below(kEights) << kFirstBit) != 0;
}

// Whether any row of the warp sees a key of the tile.
__device__ __forceinline__ bool sees_any(const ThreadMask& mask) {
  const u32 any = mask.row[0][0] | mask.row[0][1] | mask.row[1][0] | mask.row[1][1];
  return __any_sync(~0u, (any & bits_below(kEights) << kFirstBit) != 0);
}

__device__ __forceinline__ void hide_keys(const ThreadMask& mask, float hidden, float (&scores)[kKeys / 2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
        if ((mask.row[half][i] & 1u << (kFirstBit + n)) == 0) scores[4 * n + 2 * half + i] = hidden;
      }
    }
  }
}

}  // namespace vicus::gpu
