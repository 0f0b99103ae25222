#include "gpu/ahead.h"

#include <mutex>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "gpu/kernels.h"
#include "jit/ahead.h"

namespace vicus::gpu {

void compile_gradients_ahead(const Plan& plan, DType bias_type) {
  static std::mutex mutex;
  static std::set<std::tuple<int, int, Spec>> asked;
  if (!runs_on_gpu(plan.engine)) return;
  const GpuTarget& device = plan.gpu.device;
  const bool vectors = can_align(plan.problem);
  std::vector<jit::Source> sources;
  for (const Spec& spec :
       kernels_of(plan, Call{.backward = true, .vectors = vectors, .boxes = vectors, .bias_type = bias_type})) {
    const std::lock_guard lock(mutex);
    if (asked.emplace(device.major, device.minor, spec).second) sources.push_back(source_of(spec));
  }
  if (!sources.empty()) jit::compile_ahead(std::move(sources), {device.major, device.minor});
}

}  // namespace vicus::gpu
