// Independent multiply-add chains in registers, compiled for every instruction set Highway builds and dispatched at run
// time, as the library's own kernels are. Nothing touches memory, so the result is the ceiling of any kernel that
// multiplies and adds.
#include "fma_peak.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>

#include <omp.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "fma_peak.cc"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
// Must come after foreach_target.h.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vicus::bench {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Twelve chains: two pipes times a latency of four or five cycles keep at most ten busy, and twelve with their two
// operands fit the sixteen registers of AVX2. Every chain x = x * a + b converges: no value leaves the normal range. The
// chains start from different volatiles, or the compiler would merge them into one. Returns operations done.
template <class T>
double run_chains(std::int64_t rounds) {
  const hn::ScalableTag<T> d;
  volatile T start[12];
  for (int i = 0; i < 12; ++i) start[i] = static_cast<T>(1 + i);
  volatile T factor = static_cast<T>(0.5), term = static_cast<T>(0.25);
  const auto a = hn::Set(d, factor), b = hn::Set(d, term);
  auto x0 = hn::Set(d, start[0]), x1 = hn::Set(d, start[1]), x2 = hn::Set(d, start[2]), x3 = hn::Set(d, start[3]);
  auto x4 = hn::Set(d, start[4]), x5 = hn::Set(d, start[5]), x6 = hn::Set(d, start[6]), x7 = hn::Set(d, start[7]);
  auto x8 = hn::Set(d, start[8]), x9 = hn::Set(d, start[9]), x10 = hn::Set(d, start[10]), x11 = hn::Set(d, start[11]);
  for (std::int64_t i = 0; i < rounds; ++i) {
    x0 = hn::MulAdd(x0, a, b), x1 = hn::MulAdd(x1, a, b), x2 = hn::MulAdd(x2, a, b), x3 = hn::MulAdd(x3, a, b);
    x4 = hn::MulAdd(x4, a, b), x5 = hn::MulAdd(x5, a, b), x6 = hn::MulAdd(x6, a, b), x7 = hn::MulAdd(x7, a, b);
    x8 = hn::MulAdd(x8, a, b), x9 = hn::MulAdd(x9, a, b), x10 = hn::MulAdd(x10, a, b), x11 = hn::MulAdd(x11, a, b);
  }
  const auto s0 = hn::Add(hn::Add(x0, x1), hn::Add(x2, x3)), s1 = hn::Add(hn::Add(x4, x5), hn::Add(x6, x7));
  const auto s2 = hn::Add(hn::Add(x8, x9), hn::Add(x10, x11));
  volatile T sink = hn::GetLane(hn::Add(hn::Add(s0, s1), s2));  // keeps the loop alive
  static_cast<void>(sink);
  return 2.0 * 12.0 * static_cast<double>(hn::Lanes(d)) * static_cast<double>(rounds);
}

double run_float32(std::int64_t rounds) { return run_chains<float>(rounds); }
double run_float64(std::int64_t rounds) { return run_chains<double>(rounds); }
const char* target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace vicus::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vicus::bench {
namespace {

HWY_EXPORT(run_float32);
HWY_EXPORT(run_float64);
HWY_EXPORT(target_name);

using Loop = double (*)(std::int64_t);

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Operations per second of `threads` threads, from the first start to the last end.
double rate(Loop loop, std::int64_t rounds, int threads) {
  double begin = std::numeric_limits<double>::max(), end = 0, operations = 0;
#pragma omp parallel num_threads(threads) reduction(min : begin) reduction(max : end) reduction(+ : operations)
  {
#pragma omp barrier
    begin = seconds_now();
    operations = loop(rounds);
    end = seconds_now();
  }
  return operations / (end - begin);
}

}  // namespace

double measure_fma_peak(FmaType type, int threads, int tries, double seconds) {
  const Loop float32 = [](std::int64_t rounds) { return HWY_DYNAMIC_DISPATCH(run_float32)(rounds); };
  const Loop float64 = [](std::int64_t rounds) { return HWY_DYNAMIC_DISPATCH(run_float64)(rounds); };
  const Loop loop = type == FmaType::float32 ? float32 : float64;
  double one = std::numeric_limits<double>::max();  // seconds of a few rounds, undisturbed
  std::int64_t rounds = 1 << 16;
  for (int i = 0; i < 5; ++i) {
    const double start = seconds_now();
    loop(rounds);
    one = std::min(one, seconds_now() - start);
  }
  rounds = std::max<std::int64_t>(1, static_cast<std::int64_t>(static_cast<double>(rounds) * seconds / one));
  double best = 0;
  for (int i = 0; i < tries; ++i) best = std::max(best, rate(loop, rounds, threads));
  return best * 1e-9;
}

std::string fma_peak_target() { return HWY_DYNAMIC_DISPATCH(target_name)(); }

}  // namespace vicus::bench
#endif  // HWY_ONCE
