// The yardstick: fused multiply-adds per second that this machine can do with everything in registers.
#ifndef VICUS_BENCH_FMA_PEAK_H_
#define VICUS_BENCH_FMA_PEAK_H_

#include <cstdint>
#include <string>

namespace vicus::bench {

enum class FmaType : std::uint8_t { float32, float64 };

/// GFLOP/s of `threads` threads that start together, one multiply-add counted as two operations: the best of `tries` loops
/// of about `seconds` each, since anything else that runs on the machine can only make a loop slower. Many short loops
/// find a gap on a busy machine, where few long ones do not.
double measure_fma_peak(FmaType type, int threads, int tries = 100, double seconds = 0.003);

/// Highway's name of the instruction set that `measure_fma_peak` uses: the best one that this machine runs.
std::string fma_peak_target();

}  // namespace vicus::bench

#endif  // VICUS_BENCH_FMA_PEAK_H_
