// What the tests of the public API share: errors that must name an argument, and problems of a few lines.
#ifndef VICUS_TESTS_CORE_TESTING_H_
#define VICUS_TESTS_CORE_TESTING_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "vicus/vicus.hpp"

namespace vicus::testing {

/// `call` must throw InvalidArgument naming exactly `argument`, with a text that holds `got` and then `allowed`.
template <class Call>
void expect_invalid(const Call& call, const std::string& argument, const std::string& got, const std::string& allowed) {
  try {
    call();
    ADD_FAILURE() << "no error for " << argument << " = " << got;
  } catch (const InvalidArgument& error) {
    const std::string what = error.what();
    EXPECT_EQ(error.argument(), argument) << what;
    EXPECT_EQ(what.find(argument + " is " + got), 0U) << what;
    const std::size_t rest = what.find("; allowed: ");
    ASSERT_NE(rest, std::string::npos) << what;
    EXPECT_NE(what.find(allowed, rest), std::string::npos) << what;
    EXPECT_EQ(what.find('\n'), std::string::npos) << what;
  }
}

/// Neighborhood attention on a 2-D layout, valid as it stands.
inline Problem small_neighborhood() {
  Problem p;
  p.batch = 2;
  p.layout = {6, 7};
  p.heads = 4;
  p.heads_kv = 2;
  p.head_dim = 8;
  p.mask = Neighborhood{.kernel_size = {3, 5}, .stride = {1, 2}, .dilation = {2, 1}, .is_causal = {0, 1}};
  return p;
}

/// Dense attention, valid as it stands.
inline Problem small_dense() {
  Problem p;
  p.batch = 2;
  p.layout = 10;
  p.heads = 4;
  p.head_dim = 8;
  Dense mask;
  mask.keys = 12;
  p.mask = mask;
  return p;
}

/// Contiguous float32 or float64 memory with a view over it, filled with seeded noise or with one value.
template <class T>
class Tensor {
 public:
  Tensor(std::vector<std::int64_t> shape, unsigned seed) : Tensor(std::move(shape), T{}) {
    std::mt19937 engine(seed);
    std::normal_distribution<T> noise;
    for (T& x : data) x = noise(engine);
  }
  Tensor(std::vector<std::int64_t> shape, T fill)
      : layout_(shape), data(static_cast<std::size_t>(layout_.numel()), fill) {}
  [[nodiscard]] TensorView view() { return {data.data(), detail::DTypeOf<T>::value, layout_}; }

 private:
  TensorLayout layout_;

 public:
  std::vector<T> data;
};

inline Neighborhood& neighborhood(Problem& p) { return std::get<Neighborhood>(p.mask); }
inline Dense& dense(Problem& p) { return std::get<Dense>(p.mask); }

}  // namespace vicus::testing

#endif  // VICUS_TESTS_CORE_TESTING_H_
