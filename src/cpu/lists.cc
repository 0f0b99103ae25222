#include "cpu/lists.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/lists.cc"
#include "cpu/targets.h"
// The order of these matters: foreach_target includes this file once more for each target.
#include <hwy/foreach_target.h>
//
#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace vicus::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Vector `i` of a row, zeros after its end.
template <class T, class In>
HWY_INLINE hn::Vec<hn::ScalableTag<T>> part(const In* row, int i, int width) {
  const hn::ScalableTag<T> d;
  constexpr int N = static_cast<int>(kLanes<T>);
  if (i + N <= width) return load(d, row + i);
  In tail[N] = {};
  std::memcpy(tail, row + i, static_cast<std::size_t>(width - i) * sizeof(In));
  return load(d, tail);
}

template <class T, class In>
void dot_list_as(const void* row, const void* const* rows, int count, int width, void* out) {
  const hn::ScalableTag<T> d;
  constexpr int N = static_cast<int>(kLanes<T>);
  for (int r = 0; r < count; ++r) {
    auto sum = hn::Zero(d);
    for (int i = 0; i < width; i += N) {
      sum = hn::MulAdd(part<T>(static_cast<const In*>(row), i, width),
                       part<T>(static_cast<const In*>(rows[r]), i, width), sum);
    }
    static_cast<T*>(out)[r] = hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

template <class T, class In>
void sum_list_as(const void* const* rows, const void* weights, int count, int width, void* sums, void* out) {
  const hn::ScalableTag<T> d;
  constexpr int N = static_cast<int>(kLanes<T>);
  T* const sum = static_cast<T*>(sums);
  for (int i = 0; i < width; i += N) hn::StoreU(hn::Zero(d), d, sum + i);
  for (int r = 0; r < count; ++r) {
    const T weight = static_cast<const T*>(weights)[r];
    if (weight == 0) continue;
    for (int i = 0; i < width; i += N) {
      const auto x = part<T>(static_cast<const In*>(rows[r]), i, width);
      hn::StoreU(hn::MulAdd(hn::Set(d, weight), x, hn::LoadU(d, sum + i)), d, sum + i);
    }
  }
  store_row(sum, width, static_cast<In*>(out));
}

void dot_list_any(DType dtype, const void* row, const void* const* rows, int count, int width, void* out) {
  switch (dtype) {
    case DType::float64:
      return dot_list_as<double, double>(row, rows, count, width, out);
    case DType::bfloat16:
      return dot_list_as<float, BFloat16>(row, rows, count, width, out);
    case DType::float16:
      return dot_list_as<float, Float16>(row, rows, count, width, out);
    default:
      return dot_list_as<float, float>(row, rows, count, width, out);
  }
}

void sum_list_any(DType dtype, const void* const* rows, const void* weights, int count, int width, void* sums,
                  void* out) {
  switch (dtype) {
    case DType::float64:
      return sum_list_as<double, double>(rows, weights, count, width, sums, out);
    case DType::bfloat16:
      return sum_list_as<float, BFloat16>(rows, weights, count, width, sums, out);
    case DType::float16:
      return sum_list_as<float, Float16>(rows, weights, count, width, sums, out);
    default:
      return sum_list_as<float, float>(rows, weights, count, width, sums, out);
  }
}

}  // namespace vicus::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vicus::cpu {
HWY_EXPORT(dot_list_any);
HWY_EXPORT(sum_list_any);

void dot_list(DType dtype, const void* row, const void* const* rows, int count, int width, void* out) {
  HWY_DYNAMIC_DISPATCH(dot_list_any)(dtype, row, rows, count, width, out);
}

void sum_list(DType dtype, const void* const* rows, const void* weights, int count, int width, void* sums, void* out) {
  HWY_DYNAMIC_DISPATCH(sum_list_any)(dtype, rows, weights, count, width, sums, out);
}
}  // namespace vicus::cpu
#endif
