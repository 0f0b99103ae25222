#include "gpu/report.h"

#include "gpu/kernels.h"
#include "gpu/spec.h"
#include "jit/device.h"
#include "jit/module.h"

namespace vicus::gpu {

std::vector<KernelReport> report_kernels(const Plan& plan, const CallSet& calls, int device) {
  const jit::ContextGuard context(device);
  std::vector<KernelReport> reports;
  for (const Spec& spec : kernels_of(plan, calls)) {
    const jit::Kernel kernel = jit::load_kernel(source_of(spec));
    const int dynamic = shared_bytes(spec);
    reports.push_back({.name = kernel.name,
                       .threads = spec.threads(),
                       .registers = kernel.registers,
                       .local_bytes = kernel.local_bytes,
                       .shared_bytes = kernel.shared_bytes + dynamic,
                       .blocks_per_multiprocessor = jit::blocks_per_multiprocessor(kernel, spec.threads(), dynamic)});
  }
  return reports;
}

}  // namespace vicus::gpu
