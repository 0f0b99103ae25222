// Repeated calls of one function: seconds per call, and what the process grew by.
#ifndef VICUS_BENCH_TIMING_H_
#define VICUS_BENCH_TIMING_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

namespace vicus::bench {

struct TimingOptions {
  int repeats = 5;            ///< fewest samples
  double least_seconds = 0;   ///< go on sampling for at least this long
  double most_seconds = 1e9;  ///< and stop after this long, even with fewer samples
};

struct Timing {
  std::vector<double> samples;  ///< seconds per call
  double cpu_seconds = 0;       ///< processor time of all threads, per call, mean of all samples
};

/// A call of a few microseconds is repeated within its sample until the clock's own cost does not matter.
Timing time_calls(const std::function<void()>& call, const TimingOptions& options);

/// Bytes of this process that are in memory now, those of files (code) left out; empty where the system does not say. The
/// kernel counts in batches of pages per thread: good to about a quarter MiB.
std::optional<std::int64_t> resident_bytes();

/// The most that was resident at any time during `call`.
std::optional<std::int64_t> peak_resident_bytes(const std::function<void()>& call);

}  // namespace vicus::bench

#endif  // VICUS_BENCH_TIMING_H_
