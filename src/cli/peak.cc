// Compiled once for every instruction set by Highway, so that the loop runs with the widest vectors of the machine.
#include "cli/peak.h"

#include <algorithm>
#include <chrono>
#include <cstdint>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cli/peak.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vicus::cli::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Multiply-adds of `rounds` rounds; returns the operations counted. Twelve chains hide the latency of every machine that
/// Highway knows (4 to 5 cycles at 2 per cycle) and leave registers for the factors.
template <class T>
double fma_rounds(std::int64_t rounds) {
  const hn::ScalableTag<T> d;
  using V = hn::Vec<decltype(d)>;
  const V m = hn::Set(d, T(0.999)), a = hn::Set(d, T(0.001));
  // Chains that begin alike would be one chain to the compiler.
  V x0 = hn::Iota(d, T(0)), x1 = hn::Iota(d, T(1)), x2 = hn::Iota(d, T(2)), x3 = hn::Iota(d, T(3));
  V x4 = hn::Iota(d, T(4)), x5 = hn::Iota(d, T(5)), x6 = hn::Iota(d, T(6)), x7 = hn::Iota(d, T(7));
  V x8 = hn::Iota(d, T(8)), x9 = hn::Iota(d, T(9)), x10 = hn::Iota(d, T(10)), x11 = hn::Iota(d, T(11));
  for (std::int64_t i = 0; i < rounds; ++i) {
    x0 = hn::MulAdd(x0, m, a), x1 = hn::MulAdd(x1, m, a), x2 = hn::MulAdd(x2, m, a), x3 = hn::MulAdd(x3, m, a);
    x4 = hn::MulAdd(x4, m, a), x5 = hn::MulAdd(x5, m, a), x6 = hn::MulAdd(x6, m, a), x7 = hn::MulAdd(x7, m, a);
    x8 = hn::MulAdd(x8, m, a), x9 = hn::MulAdd(x9, m, a), x10 = hn::MulAdd(x10, m, a), x11 = hn::MulAdd(x11, m, a);
  }
  const V low = hn::Add(hn::Add(hn::Add(x0, x1), hn::Add(x2, x3)), hn::Add(x4, x5));
  const V high = hn::Add(hn::Add(hn::Add(x6, x7), hn::Add(x8, x9)), hn::Add(x10, x11));
  [[maybe_unused]] volatile T keep = hn::GetLane(hn::Add(low, high));  // the sum is used, so the loop stays
  return 24.0 * static_cast<double>(hn::Lanes(d)) * static_cast<double>(rounds);
}

double fma_rounds_float32(std::int64_t rounds) { return fma_rounds<float>(rounds); }

double fma_rounds_float64(std::int64_t rounds) {
#if HWY_HAVE_FLOAT64
  return fma_rounds<double>(rounds);
#else
  volatile double x = 0.001;
  for (std::int64_t i = 0; i < rounds; ++i) x = x * 0.999 + 0.001;
  return 2.0 * static_cast<double>(rounds);
#endif
}

const char* target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace vicus::cli::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vicus::cli {

HWY_EXPORT(fma_rounds_float32);
HWY_EXPORT(fma_rounds_float64);
HWY_EXPORT(target_name);

Peak measure_peak(bool float64, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  const auto work = float64 ? HWY_DYNAMIC_DISPATCH(fma_rounds_float64) : HWY_DYNAMIC_DISPATCH(fma_rounds_float32);
  constexpr double kRunSeconds = 0.003;
  constexpr std::int64_t kTrialRounds = 50000;
  constexpr int kTrials = 5;
  Peak peak;
  peak.target = HWY_DYNAMIC_DISPATCH(target_name)();
  const auto begin = Clock::now();
  double trial = kRunSeconds;
  for (int i = 0; i < kTrials; ++i) {
    const auto start = Clock::now();
    (void)work(kTrialRounds);
    trial = std::min(trial, since(start));
  }
  const auto rounds = std::max(kTrialRounds, static_cast<std::int64_t>(kTrialRounds * kRunSeconds / trial));
  do {
    double flops = 0;
    const auto start = Clock::now();
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : flops)
    for (int thread = 0; thread < threads; ++thread) flops += work(rounds);
    peak.flops_per_second = std::max(peak.flops_per_second, flops / since(start));
  } while (since(begin) < seconds);
  return peak;
}

}  // namespace vicus::cli
#endif  // HWY_ONCE
