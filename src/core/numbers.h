// Single elements of any storage type, for loops that are not hot (the reference engine, biases, tails).
#ifndef VICUS_CORE_NUMBERS_H_
#define VICUS_CORE_NUMBERS_H_

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "vicus/tensor.h"

namespace vicus {

[[nodiscard]] inline float float_from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// Rounds to nearest, ties to even; a NaN stays a NaN.
[[nodiscard]] inline std::uint16_t bfloat16_from_float(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if (std::isnan(x)) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

[[nodiscard]] inline float float_from_float16(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1FU;
  const std::uint32_t mantissa = bits & 0x3FFU;
  if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000U | (mantissa << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;  // subnormal or zero: exact
  return sign != 0 ? -magnitude : magnitude;
}

/// Rounds to nearest, ties to even; overflow becomes infinity.
[[nodiscard]] inline std::uint16_t float16_from_float(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return static_cast<std::uint16_t>(sign | 0x7E00U);
  if (magnitude >= 0x477FF000U) return static_cast<std::uint16_t>(sign | 0x7C00U);  // rounds to 65536 or more
  if (magnitude < 0x38800000U) {  // below 2^-14: the sum puts the result's last bit at 2^-24 and rounds there
    const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3F000000U));
  }
  const std::uint32_t rounded = magnitude + 0xFFFU + ((magnitude >> 13) & 1U);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
}

/// Two-byte elements in memory; the type says what the bits mean.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

/// Calls `visit` with a null pointer of the storage type: float, double, BFloat16 or Float16.
template <class Visit>
decltype(auto) visit_storage(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::float64:
      return visit(static_cast<double*>(nullptr));
    case DType::bfloat16:
      return visit(static_cast<BFloat16*>(nullptr));
    case DType::float16:
      return visit(static_cast<Float16*>(nullptr));
    default:
      return visit(static_cast<float*>(nullptr));
  }
}

/// Element `offset` of memory of type `dtype`.
[[nodiscard]] inline double load_element(const void* data, DType dtype, std::int64_t offset) {
  switch (dtype) {
    case DType::float64:
      return static_cast<const double*>(data)[offset];
    case DType::float32:
      return static_cast<double>(static_cast<const float*>(data)[offset]);
    case DType::bfloat16:
      return static_cast<double>(float_from_bfloat16(static_cast<const std::uint16_t*>(data)[offset]));
    case DType::float16:
      return static_cast<double>(float_from_float16(static_cast<const std::uint16_t*>(data)[offset]));
  }
  return 0;
}

inline void store_element(void* data, DType dtype, std::int64_t offset, double x) {
  switch (dtype) {
    case DType::float64:
      static_cast<double*>(data)[offset] = x;
      break;
    case DType::float32:
      static_cast<float*>(data)[offset] = static_cast<float>(x);
      break;
    case DType::bfloat16:
      static_cast<std::uint16_t*>(data)[offset] = bfloat16_from_float(static_cast<float>(x));
      break;
    case DType::float16:
      static_cast<std::uint16_t*>(data)[offset] = float16_from_float(static_cast<float>(x));
      break;
  }
}

}  // namespace vicus

#endif  // VICUS_CORE_NUMBERS_H_
