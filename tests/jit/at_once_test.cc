// Work that is shared among threads.
#include "jit/at_once.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

namespace vicus::jit {
namespace {

TEST(AtOnce, EveryNumberOnce) {
  for (const std::size_t count : {0, 1, 2, 100}) {
    std::vector<std::atomic<int>> calls(count);
    at_once(count, [&](std::size_t i) { ++calls.at(i); });
    for (const auto& each : calls) EXPECT_EQ(each, 1);
  }
}

TEST(AtOnce, TheFirstFailureIsThrownAndNoMoreBegins) {
  constexpr std::size_t kCount = 10000;
  std::atomic<std::size_t> begun{0};
  try {
    at_once(kCount, [&](std::size_t i) {
      ++begun;
      throw std::runtime_error(std::to_string(i));
    });
    ADD_FAILURE() << "no error";
  } catch (const std::runtime_error& error) {
    EXPECT_EQ(std::string(error.what()), "0");
  }
  EXPECT_LT(begun, kCount);
}

}  // namespace
}  // namespace vicus::jit
