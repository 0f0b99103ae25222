// What the compiler and the driver make of a plan's kernels: for benchmarks and bug reports, never on the way of a call.
#ifndef VICUS_GPU_REPORT_H_
#define VICUS_GPU_REPORT_H_

#include <string>
#include <vector>

#include "vicus/prepare.h"

namespace vicus::gpu {

struct KernelReport {
  std::string name;  ///< "forward of forward.cu"
  int threads = 0, registers = 0;
  int local_bytes = 0;   ///< stack and spills of a thread
  int shared_bytes = 0;  ///< of a block, static and dynamic
  int blocks_per_multiprocessor = 0;
};

/// One entry per kernel that `calls` may launch on `device`. Each is loaded once more, so this costs time and a little
/// memory. Throws as vicus::prepare.
[[nodiscard]] std::vector<KernelReport> report_kernels(const Plan& plan, const CallSet& calls, int device);

}  // namespace vicus::gpu

#endif  // VICUS_GPU_REPORT_H_
