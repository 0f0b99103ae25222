#include "cpu/engine.h"

#include "cpu/targets.h"
//
#include <hwy/aligned_allocator.h>
#include <hwy/highway.h>
#include <hwy/targets.h>

#include <cstdlib>

#include "core/engines.h"
#include "cpu/forward.h"
#include "cpu/parallel.h"

namespace vicus::cpu {
namespace {

std::vector<std::string> names(std::int64_t targets) {
  std::vector<std::string> list;
  for (int bit = 0; bit < 62; ++bit) {  // lower bits are better targets
    const std::int64_t target = std::int64_t{1} << bit;
    if ((targets & HWY_TARGETS & target) != 0) list.emplace_back(hwy::TargetName(target));
  }
  return list;
}

// VICUS_CPU_TARGET is read once, before the first use of a target. A name this machine does not have is ignored: an
// environment variable must not make a library throw while it is loaded.
const bool environment_read = [] {
  if (const char* wanted = std::getenv("VICUS_CPU_TARGET")) {
    for (const std::string& name : targets_available()) {
      if (name == wanted) limit_target(name);
    }
  }
  return true;
}();

}  // namespace

std::vector<std::string> targets_built() { return names(HWY_TARGETS); }

std::vector<std::string> targets_available() {
  static const std::vector<std::string> all = names(hwy::SupportedTargets());
  return all;
}

void limit_target(std::string_view name) {
  static_cast<void>(targets_available());  // before any limit
  std::int64_t target = 0;                 // 0 lifts the limit
  for (int bit = 0; bit < 62 && !name.empty(); ++bit) {
    if (name == hwy::TargetName(std::int64_t{1} << bit)) target = std::int64_t{1} << bit;
  }
  hwy::SetSupportedTargetsForTest(target);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

void forward(const Plan& plan, const AttentionInputs& in, const TensorView& output, const TensorView& logsumexp) {
  const ForwardContext context(plan, in, output, logsumexp);
  const auto task = plan.problem.dtype == DType::float64 ? forward_task_f64 : forward_task_f32;
  parallel_tasks(plan.threads, context.tasks(), context.layout.bytes,
                 [&](std::int64_t index, std::byte* scratch) { task(context, index, scratch); });
}

}  // namespace vicus::cpu
