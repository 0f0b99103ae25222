#include "gpu/kernels.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gpu/planner.h"
#include "vicus/error.h"

namespace vicus::gpu {

Kernels kernels_of(const Plan& plan, const Call& call) {
  const Problem& p = plan.problem;
  const GpuPlan& g = plan.gpu;
  Kernels list;
  const auto add = [&](Kernel kernel) {
    list.add(spec_of(plan, kernel, call.backward || call.logsumexp, call.vectors, call.bias_type));
  };
  if (!call.backward) {
    add(Kernel::forward);
    return list;
  }
  if (g.backward_keys.tile.rows == 0 || (!g.add_queries && g.backward_queries.tile.rows == 0)) {
    throw Unsupported("backward: " + no_tile(plan));
  }
  const bool summed = g.add_queries && call.grad_query;  // by the kernels of keys
  add(Kernel::delta);
  if (!g.add_queries && call.grad_query) add(Kernel::queries);
  if (call.grad_keys || summed) add(Kernel::keys);
  if (p.additional_tokens > 0 && (call.grad_additional || summed)) add(Kernel::additional);
  if (summed) add(Kernel::convert);
  if (p.rpb && call.grad_bias) add(Kernel::bias);
  return list;
}

std::vector<Spec> kernels_of(const Plan& plan, const CallSet& calls) {
  constexpr std::int64_t kAligned = 8;  // elements of 16 bits
  const Problem& p = plan.problem;
  const bool can_align = p.head_dim % kAligned == 0 && p.head_dim_v % kAligned == 0;
  std::vector<Spec> list;
  const auto add = [&](const Call& call) {
    for (const Spec& spec : kernels_of(plan, call)) {
      if (std::find(list.begin(), list.end(), spec) == list.end()) list.push_back(spec);
    }
  };
  for (const bool vectors : {true, false}) {
    if (vectors ? !can_align || !calls.aligned.value_or(true) : can_align && calls.aligned.value_or(false)) continue;
    Call call{.vectors = vectors, .bias_type = calls.bias_dtype.value_or(p.dtype)};
    if (!p.rpb && !p.attn_bias) call.bias_type = DType::float32;
    for (const bool logsumexp : {false, true}) {
      call.logsumexp = logsumexp;
      if (calls.forward && calls.logsumexp.value_or(logsumexp) == logsumexp) add(call);
    }
    call.backward = true;
    if (calls.backward) add(call);
  }
  return list;
}

}  // namespace vicus::gpu
