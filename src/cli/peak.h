// The arithmetic peak of this machine, measured: independent fused multiply-adds in registers, on every thread.
#ifndef VICUS_CLI_PEAK_H_
#define VICUS_CLI_PEAK_H_

#include <string>

namespace vicus::cli {

struct Peak {
  double flops_per_second = 0;  ///< all threads together; a multiply-add counts as two
  std::string target;           ///< instruction set of the loop: "AVX3"
};

/// Best of many short runs, `seconds` in all. Short, because on a machine with other work a run counts only if no thread
/// of it was interrupted: on two shared cores the best of five runs of 50 ms was below what attention then reached.
[[nodiscard]] Peak measure_peak(bool float64, int threads, double seconds = 0.25);

}  // namespace vicus::cli

#endif  // VICUS_CLI_PEAK_H_
