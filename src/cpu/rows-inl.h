// Rows of the caller's tensors into scratch and back: conversion of storage types, transposition to lanes. For each
// target.
#if defined(VICUS_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef VICUS_CPU_ROWS_INL_H_
#undef VICUS_CPU_ROWS_INL_H_
#else
#define VICUS_CPU_ROWS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/numbers.h"
#include "cpu/gemm-inl.h"
#include "cpu/tiles.h"
#include "cpu/transpose-inl.h"

HWY_BEFORE_NAMESPACE();
namespace vicus::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class D>
HWY_INLINE hn::Vec<D> load(D d, const hn::TFromD<D>* p) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> load(D d, const BFloat16* p) {
  const hn::Rebind<std::uint16_t, D> d16;
  const hn::RebindToUnsigned<D> d32;
  const auto wide = hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const std::uint16_t*>(p)));
  return hn::BitCast(d, hn::ShiftLeft<16>(wide));
}
template <class D>
HWY_INLINE hn::Vec<D> load(D d, const Float16* p) {
  const hn::Rebind<hwy::float16_t, D> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
}

// Streaming stores write whole lines to memory without reading them first, and leave the caches to those who need them.
// `p` is aligned to the vector.
template <bool kStream, class D>
HWY_INLINE void put(D d, hn::Vec<D> v, hn::TFromD<D>* p) {
  if constexpr (kStream) {
    hn::Stream(v, d, p);
  } else {
    hn::StoreU(v, d, p);
  }
}

template <bool kStream, class D>
HWY_INLINE void store(D d, hn::Vec<D> v, hn::TFromD<D>* p) {
  put<kStream>(d, v, p);
}
template <bool kStream, class D>
HWY_INLINE void store(D, hn::Vec<D> v, BFloat16* p) {  // to nearest, ties to even; NaN stays NaN
  const hn::RebindToUnsigned<D> d32;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<std::uint16_t, D> d16;
  const auto bits = hn::BitCast(d32, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1U));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7FFFU)));
  const auto quiet = hn::Or(bits, hn::Set(d32, 0x400000U));
  const auto chosen = hn::IfThenElse(hn::RebindMask(d32, hn::IsNaN(v)), quiet, rounded);
  const auto narrow = hn::DemoteTo(d16, hn::BitCast(di, hn::ShiftRight<16>(chosen)));
  put<kStream>(d16, narrow, reinterpret_cast<std::uint16_t*>(p));
}
template <bool kStream, class D>
HWY_INLINE void store(D d, hn::Vec<D> v, Float16* p) {  // to nearest, ties to even
#if HWY_TARGET == HWY_SSE4
  // No instruction for it, and Highway's substitute truncates. As float16_from_float in core/numbers.h.
  const hn::RebindToUnsigned<D> d32;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<std::uint16_t, D> d16;
  const auto bits = hn::BitCast(di, v);
  const auto magnitude = hn::And(bits, hn::Set(di, 0x7FFFFFFF));
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(di, 1));
  const auto rounded = hn::Add(magnitude, hn::Add(odd, hn::Set(di, 0xFFF)));
  const auto normal = hn::ShiftRight<13>(hn::Sub(rounded, hn::Set(di, 0x38000000)));
  const auto shifted = hn::Add(hn::BitCast(d, magnitude), hn::Set(d, hn::TFromD<D>{0.5F}));
  const auto subnormal = hn::Sub(hn::BitCast(di, shifted), hn::Set(di, 0x3F000000));
  auto half = hn::IfThenElse(hn::Lt(magnitude, hn::Set(di, 0x38800000)), subnormal, normal);
  half = hn::IfThenElse(hn::Gt(magnitude, hn::Set(di, 0x477FEFFF)), hn::Set(di, 0x7C00), half);
  half = hn::IfThenElse(hn::Gt(magnitude, hn::Set(di, 0x7F800000)), hn::Set(di, 0x7E00), half);
  const auto sign = hn::BitCast(di, hn::And(hn::ShiftRight<16>(hn::BitCast(d32, v)), hn::Set(d32, 0x8000U)));
  put<kStream>(d16, hn::DemoteTo(d16, hn::Or(half, sign)), reinterpret_cast<std::uint16_t*>(p));
#else
  static_cast<void>(d);
  const hn::Rebind<hwy::float16_t, D> d16;
  put<kStream>(d16, hn::DemoteTo(d16, v), reinterpret_cast<hwy::float16_t*>(p));
#endif
}

// Collects whether all values were finite: x - x has no bit set only then.
template <class T>
class Finite {
 public:
  using D = hn::ScalableTag<T>;
  Finite() : bits_(hn::Zero(D())) {}
  HWY_INLINE void add(hn::Vec<D> v) { bits_ = hn::Or(bits_, hn::Sub(v, v)); }
  HWY_INLINE bool all() const { return hn::AllTrue(D(), hn::Eq(bits_, hn::Zero(D()))); }

 private:
  hn::Vec<D> bits_;
};

// `n` values of one row into `dst`, with zeros up to the next whole vector.
template <class T, class In>
HWY_INLINE void load_row(const In* src, int n, T* dst, Finite<T>& finite) {
  const hn::ScalableTag<T> d;
  constexpr int N = static_cast<int>(kLanes<T>);
  if (n == kBlock) {  // a constant number of vectors
    for (int i = 0; i < kBlock; i += N) {
      const auto v = load(d, src + i);
      finite.add(v);
      hn::StoreU(v, d, dst + i);
    }
    return;
  }
  int i = 0;
  for (; i + N <= n; i += N) {
    const auto v = load(d, src + i);
    finite.add(v);
    hn::StoreU(v, d, dst + i);
  }
  if (i < n) {
    In tail[N] = {};
    std::memcpy(tail, src + i, static_cast<std::size_t>(n - i) * sizeof(In));
    const auto v = load(d, tail);
    finite.add(v);
    hn::StoreU(v, d, dst + i);
  }
}

template <class T, class Out, bool kStream>
HWY_INLINE void store_whole_vectors(const T* src, int n, Out* dst) {
  const hn::ScalableTag<T> d;
  constexpr int N = static_cast<int>(kLanes<T>);
  for (int i = 0; i + N <= n; i += N) store<kStream>(d, hn::LoadU(d, src + i), dst + i);
}

// `stream`: use streaming stores where the row is aligned for them.
template <class T, class Out>
HWY_INLINE void store_row(const T* src, int n, Out* dst, bool stream = false) {
  const hn::ScalableTag<T> d;
  constexpr int N = static_cast<int>(kLanes<T>);
  constexpr std::size_t kBytes = kLanes<T> * sizeof(Out);  // of a vector of results
  if constexpr (kBytes >= 16) {
    stream = stream && reinterpret_cast<std::uintptr_t>(dst) % kBytes == 0;
  } else {
    stream = false;
  }
  if (stream) {
    store_whole_vectors<T, Out, (kBytes >= 16)>(src, n, dst);
  } else {
    store_whole_vectors<T, Out, false>(src, n, dst);
  }
  const int i = n / N * N;
  if (i < n) {
    T whole[N] = {};
    Out tail[N];
    std::memcpy(whole, src + i, static_cast<std::size_t>(n - i) * sizeof(T));
    store<false>(d, hn::LoadU(d, whole), tail);
    std::memcpy(dst + i, tail, static_cast<std::size_t>(n - i) * sizeof(Out));
  }
}

// Packed rows: feature f of row r lies at data[(f / block) * block_step + r * block + f % block].
template <class T>
struct Panel {
  Panel() = default;
  Panel(T* to, int features, int block_features, std::size_t step)
      : data(to),
        width(features),
        block(block_features),
        block_step(step),
        block_count((features + block_features - 1) / block_features) {}

  [[nodiscard]] int block_width(int b) const { return b + 1 < block_count ? block : width - b * block; }
  [[nodiscard]] T* at(int b, int row) const {
    return data + static_cast<std::size_t>(b) * block_step +
           static_cast<std::size_t>(row) * static_cast<std::size_t>(block);
  }

  T* data = nullptr;
  int width = 0, block = kBlock;
  std::size_t block_step = 0;
  int block_count = 0;
};

template <class T, class In>
HWY_INLINE void load_panel_row(const In* src, const Panel<T>& panel, int row, Finite<T>& finite) {
  for (int b = 0; b < panel.block_count; ++b)
    load_row(src + b * panel.block, panel.block_width(b), panel.at(b, row), finite);
}

// Rows of one head are far apart: they miss the first caches, no hardware prefetcher sees a stream in them, and where the
// distance is a power of two they share a few cache sets. So rows are fetched this far ahead, into the second cache: the
// first would lose them again (2-D window 7, 8 heads: 8.5 ms without, 6.6 ms into the first, 5.7 ms into the second).
inline constexpr int kFetchAhead = 24;

HWY_INLINE void fetch_row(const void* row, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const std::byte*>(row) + i, 0, 2);
  // GCC takes a function that only prefetches for one without effect, and drops its calls.
  asm volatile("" : : "r"(row));
}

// Rows of `box` into the panel from row `row`, row-major. Returns whether all values were finite.
template <class T, class In>
bool pack_as(const void* base, const RowMap& map, const Box& box, std::int64_t head, const Panel<T>& panel, int row) {
  Finite<T> finite;
  const std::size_t bytes = static_cast<std::size_t>(panel.width) * sizeof(In);
  const Span line = box.axis[2];
  const auto start = [&](int i, int j) { return static_cast<const In*>(base) + map.row({i, j, line.begin}, head); };
  for (int i = box.axis[0].begin; i < box.axis[0].end; ++i) {
    for (int j = box.axis[1].begin; j < box.axis[1].end; ++j) {
      const In* src = start(i, j);
      const bool last = j + 1 == box.axis[1].end;
      const In* next = last ? start(i + 1, box.axis[1].begin) : start(i, j + 1);  // fetching past the end does no harm
      for (int k = 0; k < line.size(); ++k, src += map.step[2]) {
        const int over = k + kFetchAhead - line.size();
        fetch_row(over < 0 ? src + kFetchAhead * map.step[2] : next + over * map.step[2], bytes);
        load_panel_row(src, panel, row++, finite);
      }
    }
  }
  return finite.all();
}

template <class T>
bool pack(const ConstTensorView& t, const RowMap& map, const Box& box, std::int64_t head, const Panel<T>& panel,
          int row = 0) {
  if constexpr (sizeof(T) == 8) {
    return pack_as<T, T>(t.data(), map, box, head, panel, row);
  } else {
    switch (t.dtype()) {
      case DType::bfloat16:
        return pack_as<T, BFloat16>(t.data(), map, box, head, panel, row);
      case DType::float16:
        return pack_as<T, Float16>(t.data(), map, box, head, panel, row);
      default:
        return pack_as<T, T>(t.data(), map, box, head, panel, row);
    }
  }
}

// Rows of the panel to the tensor, each value times `factor`.
template <class T, class Out>
void unpack_as(const Panel<T>& panel, T factor, void* base, const RowMap& map, const Box& box, std::int64_t head) {
  const hn::ScalableTag<T> d;
  int row = 0;
  for (int i = box.axis[0].begin; i < box.axis[0].end; ++i) {
    for (int j = box.axis[1].begin; j < box.axis[1].end; ++j) {
      for (int k = box.axis[2].begin; k < box.axis[2].end; ++k, ++row) {
        Out* dst = static_cast<Out*>(base) + map.row({i, j, k}, head);
        for (int b = 0; b < panel.block_count; ++b) {
          T* src = panel.at(b, row);
          for (int f = 0; f < panel.block_width(b); f += static_cast<int>(kLanes<T>)) {
            hn::StoreU(hn::Mul(hn::LoadU(d, src + f), hn::Set(d, factor)), d, src + f);
          }
          store_row(src, panel.block_width(b), dst + b * panel.block);
        }
      }
    }
  }
}

template <class T>
void unpack(const Panel<T>& panel, T factor, const TensorView& t, const RowMap& map, const Box& box,
            std::int64_t head) {
  if constexpr (sizeof(T) == 8) {
    unpack_as<T, T>(panel, factor, t.data(), map, box, head);
  } else {
    switch (t.dtype()) {
      case DType::bfloat16:
        return unpack_as<T, BFloat16>(panel, factor, t.data(), map, box, head);
      case DType::float16:
        return unpack_as<T, Float16>(panel, factor, t.data(), map, box, head);
      default:
        return unpack_as<T, T>(panel, factor, t.data(), map, box, head);
    }
  }
}

// A query tile's rows: into a panel of blocks [rows][kBlock] (absent lanes zero) and, where `lanes` is given, as lanes
// [feature][rows] times `factor`. Without a panel to keep, `panel.block_step` is 0: blocks reuse one place, or none where
// rows can go to lanes as they are. Returns whether all values in the panel were finite.
template <class T, class In>
bool load_tile_as(const void* base, const RowMap& map, const Tile& tile, int rows, const Panel<T>& panel, T factor,
                  T* lanes) {
  Finite<T> finite;
  if constexpr (std::is_same_v<In, T>) {
    if (panel.block_step == 0 && panel.width % static_cast<int>(kLanes<T>) == 0) {
      alignas(64) static constexpr T kZeros[kBlock] = {};
      const T* start[kMaxRows];
      std::int64_t step[kMaxRows] = {};  // absent lanes stay at the zeros
      std::fill_n(start, rows, kZeros);
      tile.for_each_lane([&](int lane, int head, const Position& p) HWY_ATTR {
        start[lane] = static_cast<const T*>(base) + map.row(p, head);
        step[lane] = kBlock;
      });
      for (int b = 0; b < panel.block_count; ++b) {
        rows_to_lanes<T>([&](std::size_t lane) HWY_ATTR { return start[lane] + b * step[lane]; }, rows,
                         panel.block_width(b), factor,
                         lanes + static_cast<std::size_t>(b * kBlock) * static_cast<std::size_t>(rows));
      }
      return true;
    }
  }
  for (int b = 0; b < panel.block_count; ++b) {
    const int width = panel.block_width(b);
    if (tile.lanes() != rows) {
      std::memset(panel.at(b, 0), 0, static_cast<std::size_t>(rows) * kBlock * sizeof(T));
    }
    tile.for_each_lane([&](int lane, int head, const Position& p) HWY_ATTR {
      load_row(static_cast<const In*>(base) + map.row(p, head) + b * kBlock, width, panel.at(b, lane), finite);
    });
    if (lanes != nullptr) {
      rows_to_lanes<T>([&](std::size_t lane) HWY_ATTR { return panel.at(b, static_cast<int>(lane)); }, rows, width,
                       factor, lanes + static_cast<std::size_t>(b * kBlock) * static_cast<std::size_t>(rows));
    }
  }
  return finite.all();
}

// Starts fetching the rows that load_tile will read.
inline void fetch_tile(const ConstTensorView& t, const RowMap& map, const Tile& tile, std::int64_t width) {
  const auto bytes = static_cast<std::int64_t>(dtype_size(t.dtype()));
  tile.for_each_lane([&](int, int head, const Position& p) HWY_ATTR {
    fetch_row(static_cast<const std::byte*>(t.data()) + map.row(p, head) * bytes,
              static_cast<std::size_t>(width * bytes));
  });
}

template <class T>
bool load_tile(const ConstTensorView& t, const RowMap& map, const Tile& tile, int rows, const Panel<T>& panel, T factor,
               T* lanes) {
  if constexpr (sizeof(T) == 8) {
    return load_tile_as<T, T>(t.data(), map, tile, rows, panel, factor, lanes);
  } else {
    switch (t.dtype()) {
      case DType::bfloat16:
        return load_tile_as<T, BFloat16>(t.data(), map, tile, rows, panel, factor, lanes);
      case DType::float16:
        return load_tile_as<T, Float16>(t.data(), map, tile, rows, panel, factor, lanes);
      default:
        return load_tile_as<T, T>(t.data(), map, tile, rows, panel, factor, lanes);
    }
  }
}

// lanes[feature][rows] times factor[row], to the tensor's rows. `piece` is scratch of [rows][kBlock], `stream` as in
// store_row.
template <class T, class Out>
void store_tile_as(const T* lanes, const T* factor, int width, int rows, void* base, const RowMap& map,
                   const Tile& tile, T* piece, bool stream) {
  const hn::ScalableTag<T> d;
  using V = hn::Vec<decltype(d)>;
  constexpr std::size_t N = kLanes<T>;
  const auto row_count = static_cast<std::size_t>(rows);
  for (int done = 0; done < width; done += kBlock) {
    const int n = width - done < kBlock ? width - done : kBlock;
    const auto features = static_cast<std::size_t>(n);
    for (std::size_t first = 0; first < row_count; first += N) {
      const auto f = hn::LoadU(d, factor + first);
      const T* src = lanes + static_cast<std::size_t>(done) * row_count + first;
      for (std::size_t q = 0; q < features; q += N) {
        transpose_square<T>(
            [&](std::size_t i) HWY_ATTR {
              return q + i < features ? hn::Mul(hn::LoadU(d, src + (q + i) * row_count), f) : hn::Zero(d);
            },
            [&](std::size_t lane, V v) HWY_ATTR { hn::StoreU(v, d, piece + (first + lane) * kBlock + q); });
      }
    }
    tile.for_each_lane([&](int lane, int head, const Position& p) HWY_ATTR {
      store_row(piece + static_cast<std::size_t>(lane) * kBlock, n, static_cast<Out*>(base) + map.row(p, head) + done,
                stream);
    });
  }
}

template <class T>
void store_tile(const T* lanes, const T* factor, int width, int rows, const TensorView& t, const RowMap& map,
                const Tile& tile, T* piece, bool stream = false) {
  if constexpr (sizeof(T) == 8) {
    store_tile_as<T, T>(lanes, factor, width, rows, t.data(), map, tile, piece, stream);
  } else {
    switch (t.dtype()) {
      case DType::bfloat16:
        return store_tile_as<T, BFloat16>(lanes, factor, width, rows, t.data(), map, tile, piece, stream);
      case DType::float16:
        return store_tile_as<T, Float16>(lanes, factor, width, rows, t.data(), map, tile, piece, stream);
      default:
        return store_tile_as<T, T>(lanes, factor, width, rows, t.data(), map, tile, piece, stream);
    }
  }
}

}  // namespace vicus::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // VICUS_CPU_ROWS_INL_H_
