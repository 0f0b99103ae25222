// Rows to lanes and back, by whole vectors in registers: no load waits for stores of another width. For each target.
#if defined(VICUS_CPU_TRANSPOSE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef VICUS_CPU_TRANSPOSE_INL_H_
#undef VICUS_CPU_TRANSPOSE_INL_H_
#else
#define VICUS_CPU_TRANSPOSE_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>

#include "cpu/gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace vicus::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Blocks of 16 bytes: block b of result j is block j of v[b].
template <class D, std::size_t kBlocks>
HWY_INLINE void transpose_blocks(D d, hn::Vec<D> (&v)[kBlocks]) {
  if constexpr (kBlocks == 2) {
    const auto lower = hn::ConcatLowerLower(d, v[1], v[0]);
    v[1] = hn::ConcatUpperUpper(d, v[1], v[0]);
    v[0] = lower;
  } else if constexpr (kBlocks == 4) {
    hn::Vec<D> even[2], odd[2];  // of rows 0 and 1, and of 2 and 3, in turns
    for (std::size_t i = 0; i < 2; ++i) {
      even[i] = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(v[2 * i + 1]), v[2 * i]);
      odd[i] = hn::OddEvenBlocks(v[2 * i + 1], hn::SwapAdjacentBlocks(v[2 * i]));
    }
    v[0] = hn::ConcatLowerLower(d, even[1], even[0]);
    v[1] = hn::ConcatLowerLower(d, odd[1], odd[0]);
    v[2] = hn::ConcatUpperUpper(d, even[1], even[0]);
    v[3] = hn::ConcatUpperUpper(d, odd[1], odd[0]);
  } else {
    static_assert(kBlocks == 1);
  }
}

// Lanes of each block of 16 bytes: lane j of result i is lane i of v[j].
template <class D>
HWY_INLINE void transpose_in_blocks(D d, hn::Vec<D> (&v)[2]) {
  const auto lower = hn::InterleaveLower(d, v[0], v[1]);
  v[1] = hn::InterleaveUpper(d, v[0], v[1]);
  v[0] = lower;
}
template <class D>
HWY_INLINE void transpose_in_blocks(D d, hn::Vec<D> (&v)[4]) {
  const auto lower02 = hn::InterleaveLower(d, v[0], v[2]), upper02 = hn::InterleaveUpper(d, v[0], v[2]);
  const auto lower13 = hn::InterleaveLower(d, v[1], v[3]), upper13 = hn::InterleaveUpper(d, v[1], v[3]);
  v[0] = hn::InterleaveLower(d, lower02, lower13);
  v[1] = hn::InterleaveUpper(d, lower02, lower13);
  v[2] = hn::InterleaveLower(d, upper02, upper13);
  v[3] = hn::InterleaveUpper(d, upper02, upper13);
}

// A square of as many rows as a vector has lanes: row r is load(r), column c goes to store(c, vector).
template <class T, class Load, class Store>
HWY_INLINE void transpose_square(const Load& load_vector, const Store& store_vector) {
  const hn::ScalableTag<T> d;
  using V = hn::Vec<decltype(d)>;
  constexpr std::size_t kInBlock = 16 / sizeof(T), kBlocks = kLanes<T> / kInBlock;
  V part[kBlocks][kInBlock];  // of kInBlock columns
  for (std::size_t i = 0; i < kInBlock; ++i) {
    V rows[kBlocks];
    for (std::size_t b = 0; b < kBlocks; ++b) rows[b] = load_vector(b * kInBlock + i);
    transpose_blocks(d, rows);
    for (std::size_t b = 0; b < kBlocks; ++b) part[b][i] = rows[b];
  }
  for (std::size_t b = 0; b < kBlocks; ++b) {
    transpose_in_blocks(d, part[b]);
    for (std::size_t i = 0; i < kInBlock; ++i) store_vector(b * kInBlock + i, part[b][i]);
  }
}

// The first `width` features of `rows` rows to lanes[feature][rows], times `factor`; row_at(lane) is where a row starts.
// Rows are read, and lanes written, up to the next whole vector.
template <class T, class RowAt>
HWY_INLINE void rows_to_lanes(const RowAt& row_at, int rows, int width, T factor, T* lanes) {
  const hn::ScalableTag<T> d;
  constexpr std::size_t N = kLanes<T>;
  const auto f = hn::Set(d, factor);
  const auto row_count = static_cast<std::size_t>(rows), features = static_cast<std::size_t>(width);
  for (std::size_t first = 0; first < row_count; first += N) {
    for (std::size_t q = 0; q < features; q += N) {
      T* dst = lanes + q * row_count + first;
      transpose_square<T>([&](std::size_t lane) HWY_ATTR { return hn::LoadU(d, row_at(first + lane) + q); },
                          [&](std::size_t feature, hn::Vec<decltype(d)> v)
                              HWY_ATTR { hn::StoreU(hn::Mul(v, f), d, dst + feature * row_count); });
    }
  }
}

}  // namespace vicus::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // VICUS_CPU_TRANSPOSE_INL_H_
