// The yardstick: fused multiply-adds per second that this machine can do with everything in registers.
#ifndef VICUS_BENCH_FMA_PEAK_H_
#define VICUS_BENCH_FMA_PEAK_H_

#include <string>

namespace vicus::bench {

struct FmaPeak {
  double float32_gflops = 0, float64_gflops = 0;  ///< one multiply-add counts as two operations
};

/// Peak of `threads` threads that start together: the best of `tries` loops of about `seconds` each, since anything else
/// that runs on the machine can only make a loop slower. Many short loops find a gap on a busy machine, where few long
/// ones do not.
FmaPeak measure_fma_peak(int threads, int tries = 200, double seconds = 0.003);

/// Highway's name of the instruction set that `measure_fma_peak` uses: the best one that this machine runs.
std::string fma_peak_target();

}  // namespace vicus::bench

#endif  // VICUS_BENCH_FMA_PEAK_H_
