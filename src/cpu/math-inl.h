// Vector arithmetic: powers of two and masks. For each target.
#if defined(VICUS_CPU_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef VICUS_CPU_MATH_INL_H_
#undef VICUS_CPU_MATH_INL_H_
#else
#define VICUS_CPU_MATH_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <iterator>

HWY_BEFORE_NAMESPACE();
namespace vicus::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 2^x = 2^n * 2^f, n the nearest integer, |f| <= 1/2. Adding `shift` leaves n, biased like an exponent, in the low bits
// of the sum; moved to the exponent's place they are 2^n, or 0 at the lower bound, so that 2^-inf is exactly 0. The
// polynomials are minimax for the relative error on [-1/2, 1/2] (weighted Remez exchange); 2^0 is exactly 1.
template <class T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr float least = -127.0F;
  static constexpr float shift = 0x1.8p23F + 127.0F;
  static constexpr int exponent_bit = 23;
  // Relative error 1.9e-9 before rounding.
  static constexpr float coefficient[] = {1.5345811e-4F, 1.3399931e-3F, 9.618489e-3F, 5.5503288e-2F,
                                          2.4022647e-1F, 6.9314721e-1F, 1.0F};
};

template <>
struct Exp2<double> {
  static constexpr double least = -1023.0;
  static constexpr double shift = 0x1.8p52 + 1023.0;
  static constexpr int exponent_bit = 52;
  // Relative error 3.1e-18 before rounding.
  static constexpr double coefficient[] = {
      4.4352818921179420508e-10, 7.0741056134994288393e-9, 1.0178198127112661334e-7, 1.321543308967195582e-6,
      1.5252733489975452922e-5,  1.5403530462514451054e-4, 1.3333558146789935436e-3, 9.6181291075883352218e-3,
      5.5504108664819921544e-2,  0.24022650695910156204,   0.69314718055994533046,   1.0};
};

template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2_fraction(D d, V f) {
  using T = hn::TFromD<D>;
  V y = hn::Set(d, Exp2<T>::coefficient[0]);
  for (std::size_t i = 1; i < std::size(Exp2<T>::coefficient); ++i) {
    y = hn::MulAdd(y, f, hn::Set(d, Exp2<T>::coefficient[i]));
  }
  return y;
}

/// 2^x for x <= 127. NaN stays NaN: operands of Max are ordered so that x86 returns it.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2(D d, V x) {
  using T = hn::TFromD<D>;
  const hn::RebindToUnsigned<D> du;
  const V bounded = hn::Max(hn::Set(d, Exp2<T>::least), x);
  const V shift = hn::Set(d, Exp2<T>::shift);
  const V shifted = hn::Add(bounded, shift);
  const V f = hn::Sub(bounded, hn::Sub(shifted, shift));
  const V power = hn::BitCast(d, hn::ShiftLeft<Exp2<T>::exponent_bit>(hn::BitCast(du, shifted)));
  return hn::Mul(exp2_fraction(d, f), power);
}

/// Lanes [first, first + N) of a 64-lane mask word.
template <class D>
HWY_INLINE hn::Mask<D> lanes_of(D d, std::uint64_t word, std::size_t first) {
  const std::uint64_t bits = word >> first;
  return hn::LoadMaskBits(d, reinterpret_cast<const std::uint8_t*>(&bits));
}

}  // namespace vicus::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // VICUS_CPU_MATH_INL_H_
