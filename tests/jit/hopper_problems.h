// An H100, and small problems for its engine: two heads of each of two batch entries.
#ifndef VICUS_TESTS_JIT_HOPPER_PROBLEMS_H_
#define VICUS_TESTS_JIT_HOPPER_PROBLEMS_H_

#include <cstdint>

#include "vicus/vicus.hpp"

namespace vicus::testing {

inline constexpr GpuTarget kH100 = {9, 0, 132, 232448};

inline Problem problem_of(AxisValues layout, const Neighborhood& mask, std::int64_t head_dim = 64) {
  Problem p;
  p.dtype = DType::bfloat16;
  p.batch = 2;
  p.layout = layout;
  p.heads = p.heads_kv = 2;
  p.head_dim = p.head_dim_v = head_dim;
  p.mask = mask;
  return p;
}

inline Problem dense_problem(std::int64_t queries, std::int64_t keys, Dense mask = {}) {
  Problem p = problem_of({queries}, {}, 128);
  mask.keys = keys;
  p.mask = mask;
  return p;
}

}  // namespace vicus::testing

#endif  // VICUS_TESTS_JIT_HOPPER_PROBLEMS_H_
