// Elements of a strided tensor in row-major order.
#ifndef VICUS_CORE_ELEMENTS_H_
#define VICUS_CORE_ELEMENTS_H_

#include <array>
#include <cstdint>

#include "vicus/tensor.h"

namespace vicus {

/// Calls `visit(index, offset)` for every element: its number in row-major order and its place in memory, in elements.
template <class Visit>
void for_each_element(const TensorLayout& t, const Visit& visit) {
  std::array<std::int64_t, kMaxDims> at{};
  std::int64_t offset = 0;
  const std::int64_t count = t.numel();
  for (std::int64_t index = 0; index < count; ++index) {
    visit(index, offset);
    for (int i = t.dims(); i-- > 0;) {
      std::int64_t& n = at[static_cast<std::size_t>(i)];
      offset += t.stride(i);
      if (++n < t.size(i)) break;
      offset -= n * t.stride(i);
      n = 0;
    }
  }
}

/// The layout of `t[0]`: its first dimension taken away.
[[nodiscard]] inline TensorLayout first_slice(const TensorLayout& t) {
  return {t.shape().subspan(1), t.strides().subspan(1)};
}

}  // namespace vicus

#endif  // VICUS_CORE_ELEMENTS_H_
