// A check of a fuzzer: what libFuzzer reports as a crash.
#ifndef VICUS_TESTS_FUZZ_REQUIRE_H_
#define VICUS_TESTS_FUZZ_REQUIRE_H_

#include <cstdio>
#include <cstdlib>

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

#endif  // VICUS_TESTS_FUZZ_REQUIRE_H_
