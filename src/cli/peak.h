// The arithmetic peak of this machine, measured: independent fused multiply-adds in registers, on every thread.
#ifndef VICUS_CLI_PEAK_H_
#define VICUS_CLI_PEAK_H_

#include <string>

namespace vicus::cli {

struct Peak {
  double flops_per_second = 0;  ///< all threads together; a multiply-add counts as two
  std::string target;           ///< instruction set of the loop: "AVX3"
};

/// Best of a few runs of about `seconds` each.
[[nodiscard]] Peak measure_peak(bool float64, int threads, double seconds = 0.05);

}  // namespace vicus::cli

#endif  // VICUS_CLI_PEAK_H_
