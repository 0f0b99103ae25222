// The one matrix product of the CPU engine, and all its uses. For each target.
//
//   C[r][:] = init + sum over steps i of A(r, i) * B[i][:]
//
// A is read one scalar at a time and broadcast, B and C are rows of vectors. Three uses, differing in how A is walked:
//   rows . lanes   S[key][query] = sum_d K[key][d] * Qt[d][query]             A rows are kBlock apart, steps adjacent
//   lanes += rows  Ot[dv][query] += sum_key V[key][dv] * P[key][query]        A rows adjacent, steps a row of V apart
//   rows += lanes  dV[key][dv] += sum_query P[key][query] * dO[query][dv]     A rows are a tile apart, steps adjacent
// Queries in lanes: the softmax needs no horizontal step, and K and V are used in the order they lie in memory.
//
// The micro kernel holds a block of C in registers: NK rows x MV vectors. Distances between rows of A are compile-time,
// so that every broadcast is one load with a constant offset.
#if defined(VICUS_CPU_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef VICUS_CPU_GEMM_INL_H_
#undef VICUS_CPU_GEMM_INL_H_
#else
#define VICUS_CPU_GEMM_INL_H_
#endif

#include <hwy/highway.h>

#include <array>
#include <cstddef>
#include <utility>

#include "cpu/math-inl.h"
#include "cpu/tiles.h"

HWY_BEFORE_NAMESPACE();
namespace vicus::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
inline constexpr std::size_t kLanes = HWY_LANES(T);

// Whether tiles of so many rows can fold windows (tiles.h): one vector of several blocks holds them. A shared step costs a
// shuffle instead of a second multiply-add; with vectors of one or two blocks there would be nothing to win.
template <class T, int kRows>
inline constexpr bool kFolds = kRows == kFoldRows && kLanes<T> == kFoldRows && sizeof(T) == 4;

// What C holds before the sum: nothing, itself, or itself times one factor per column.
enum class Init { zero, keep, scale };

// kRowStep: elements between rows of A. kUnitStep: consecutive steps of A are adjacent.
template <int kRowStep, bool kUnitStep>
struct Walk {
  static constexpr int row_step = kRowStep;
  static constexpr bool unit_step = kUnitStep;
};

// The steps of A are those of `runs`: rows start, start + 1, ... of each, `a_step` elements apart. B has one row per step.
// Lanes in a run's `others` take its other rows.
template <class T>
struct Product {
  const T* a;
  std::size_t a_step;
  const T* b;
  std::size_t b_step;
  T* c;
  std::size_t c_step;
  const Run* runs;
  int run_count;
  Init init;
  const T* factor;  // Init::scale, one per column of C
};

// The steps of a run whose rows differ by lanes: acc[r] += A(r, i) * B[i]. Four adjacent scalars of A, of each block of
// lanes its own, are loaded at once, and each is spread over its block by a shuffle.
template <class T, class W, int NK>
HWY_INLINE void folded_steps(const T* HWY_RESTRICT a, const T* HWY_RESTRICT other, hn::Mask<hn::ScalableTag<T>> others,
                             int steps, std::size_t a_step, const T* HWY_RESTRICT b, std::size_t b_step,
                             hn::Vec<hn::ScalableTag<T>> (&acc)[NK][1]) {
  const hn::ScalableTag<T> d;
  if constexpr (W::unit_step) {
    for (; steps >= 4; steps -= 4) {
      const auto b0 = hn::LoadU(d, b), b1 = hn::LoadU(d, b + b_step);
      const auto b2 = hn::LoadU(d, b + 2 * b_step), b3 = hn::LoadU(d, b + 3 * b_step);
      for (int r = 0; r < NK; ++r) {
        const auto x =
            hn::IfThenElse(others, hn::LoadDup128(d, other + r * W::row_step), hn::LoadDup128(d, a + r * W::row_step));
        acc[r][0] = hn::MulAdd(hn::Broadcast<0>(x), b0, acc[r][0]);
        acc[r][0] = hn::MulAdd(hn::Broadcast<1>(x), b1, acc[r][0]);
        acc[r][0] = hn::MulAdd(hn::Broadcast<2>(x), b2, acc[r][0]);
        acc[r][0] = hn::MulAdd(hn::Broadcast<3>(x), b3, acc[r][0]);
      }
      a += 4;
      other += 4;
      b += 4 * b_step;
    }
  }
  constexpr int kWhole = W::row_step == 1 ? NK / 4 * 4 : 0;  // adjacent rows
#pragma GCC unroll 2
  for (; steps > 0; --steps) {
    const auto bv = hn::LoadU(d, b);
    for (int r = 0; r < kWhole; r += 4) {
      const auto x = hn::IfThenElse(others, hn::LoadDup128(d, other + r), hn::LoadDup128(d, a + r));
      acc[r][0] = hn::MulAdd(hn::Broadcast<0>(x), bv, acc[r][0]);
      acc[r + 1][0] = hn::MulAdd(hn::Broadcast<1>(x), bv, acc[r + 1][0]);
      acc[r + 2][0] = hn::MulAdd(hn::Broadcast<2>(x), bv, acc[r + 2][0]);
      acc[r + 3][0] = hn::MulAdd(hn::Broadcast<3>(x), bv, acc[r + 3][0]);
    }
    for (int r = kWhole; r < NK; ++r) {
      const auto x = hn::IfThenElse(others, hn::Set(d, other[r * W::row_step]), hn::Set(d, a[r * W::row_step]));
      acc[r][0] = hn::MulAdd(x, bv, acc[r][0]);
    }
    a += a_step;
    other += a_step;
    b += b_step;
  }
}

template <class T, class W, int NK, int MV>
HWY_NOINLINE void micro(const Product<T>& p) {
  const hn::ScalableTag<T> d;
  using V = hn::Vec<decltype(d)>;
  constexpr std::size_t N = kLanes<T>;
  V acc[NK][MV];  // in registers only if all loops over it are unrolled
  if (p.init == Init::zero) {
#pragma GCC unroll 16
    for (int r = 0; r < NK; ++r) {
      for (int m = 0; m < MV; ++m) acc[r][m] = hn::Zero(d);
    }
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < NK; ++r) {
      for (int m = 0; m < MV; ++m) acc[r][m] = hn::LoadU(d, p.c + r * p.c_step + m * N);
    }
    if (p.init == Init::scale) {
      for (int m = 0; m < MV; ++m) {
        const V f = hn::LoadU(d, p.factor + m * N);
#pragma GCC unroll 16
        for (int r = 0; r < NK; ++r) acc[r][m] = hn::Mul(acc[r][m], f);
      }
    }
  }
  const T* HWY_RESTRICT b = p.b;
  const std::size_t a_step = W::unit_step ? 1 : p.a_step;
  const std::size_t b_step = p.b_step;
  for (const Run* run = p.runs; run != p.runs + p.run_count; ++run) {
    const T* HWY_RESTRICT a = p.a + static_cast<std::size_t>(run->start) * a_step;
    if constexpr (MV == 1 && kFolds<T, static_cast<int>(N)>) {
      if (run->others != 0) {
        const T* other = p.a + static_cast<std::ptrdiff_t>(run->other) * static_cast<std::ptrdiff_t>(a_step);
        folded_steps<T, W, NK>(a, other, lanes_of(d, run->others, 0), run->len, a_step, b, b_step, acc);
        b += static_cast<std::size_t>(run->len) * b_step;
        continue;
      }
    }
#pragma GCC unroll 4
    for (int i = run->len; i > 0; --i) {
      V bv[MV];
      for (int m = 0; m < MV; ++m) bv[m] = hn::LoadU(d, b + m * N);
      for (int r = 0; r < NK; ++r) {
        const V av = hn::Set(d, a[r * W::row_step]);
        for (int m = 0; m < MV; ++m) acc[r][m] = hn::MulAdd(av, bv[m], acc[r][m]);
      }
      a += a_step;
      b += b_step;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < NK; ++r) {
    for (int m = 0; m < MV; ++m) hn::StoreU(acc[r][m], d, p.c + r * p.c_step + m * N);
  }
}

// Registers: 32 on AVX-512 and NEON, 16 before. One is left for the broadcast, MV for the row of B.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == HWY_NEON
inline constexpr int kMostVectors = 4;
inline constexpr int kMostRows[] = {0, 16, 12, 8, 6};
#else
inline constexpr int kMostVectors = 2;
inline constexpr int kMostRows[] = {0, 12, 6};
#endif

template <class T, class W, int MV>
void product_columns(Product<T> p, int rows) {
  constexpr int kMost = kMostRows[MV];
  using Kernel = void (*)(const Product<T>&);
  static constexpr auto kTable = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array<Kernel, kMost>{&micro<T, W, I + 1, MV>...};
  }(std::make_integer_sequence<int, kMost>{});
  // Pieces of equal height: a short last piece would wait on the latency of its few sums.
  for (int pieces = (rows + kMost - 1) / kMost; pieces > 0; --pieces) {
    const int height = (rows + pieces - 1) / pieces;
    kTable[static_cast<std::size_t>(height - 1)](p);
    rows -= height;
    p.a += static_cast<std::ptrdiff_t>(height) * W::row_step;
    p.c += static_cast<std::size_t>(height) * p.c_step;
  }
}

/// `rows` x `vectors` of C.
template <class T, class W>
HWY_INLINE void product(Product<T> p, int rows, int vectors) {
  const auto advance = [&p](int n) {
    const std::size_t columns = static_cast<std::size_t>(n) * kLanes<T>;
    p.b += columns;
    p.c += columns;
    if (p.factor != nullptr) p.factor += columns;
  };
  if constexpr (kMostVectors == 4) {
    for (; vectors >= 4; vectors -= 4) {
      product_columns<T, W, 4>(p, rows);
      advance(4);
    }
    if (vectors == 3) return product_columns<T, W, 3>(p, rows);
  }
  for (; vectors >= 2; vectors -= 2) {
    product_columns<T, W, 2>(p, rows);
    advance(2);
  }
  if (vectors == 1) product_columns<T, W, 1>(p, rows);
}

}  // namespace vicus::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // VICUS_CPU_GEMM_INL_H_
