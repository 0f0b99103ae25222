#include "gpu/kernels.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace vicus::gpu {

bool can_align(const Problem& problem) {
  const auto vector = static_cast<std::int64_t>(16 / dtype_size(problem.dtype));  // elements
  return problem.head_dim % vector == 0 && problem.head_dim_v % vector == 0;
}

Kernels kernels_of(const Plan& plan, const Call& call) {
  const Problem& p = plan.problem;
  const GpuPlan& g = plan.gpu;
  const auto* dense = std::get_if<Dense>(&p.mask);
  const bool rest = dense != nullptr && dense->device.sequences > 0;  // lists that may end before the tokens do
  Kernels list;
  const bool boxes = call.backward && call.boxes && g.backward.keys.family == GpuKernels::warpgroups;
  const auto of = [&](Kernel kernel) {
    Spec spec = spec_of(plan, kernel, call.backward || call.logsumexp, call.vectors, call.bias_type);
    if (boxes) {
      if (!loads_boxes(kernel)) spec.add_queries = false;
      spec.careful_sums = kernel == Kernel::convert;
    }
    return spec;
  };
  const auto add = [&](Kernel kernel) { list.add(of(kernel)); };
  if (!call.backward) {
    const bool planned = g.forward.family == GpuKernels::warpgroups;
    const GpuKernelPlan& otherwise = planned ? g.forward_unboxed : g.forward;
    if (planned && call.boxes) {
      add(Kernel::sm90_forward);
      if (g.forward.key_parts > 1) {
        list.add(merge_spec(Kernel::merge_parts, p.dtype, static_cast<int>(p.head_dim_v), call.vectors));
      }
    } else {
      add(otherwise.family == GpuKernels::plain ? Kernel::plain_forward : Kernel::forward);
    }
    if (rest) add(Kernel::packed_rest);
    return list;
  }
  const GpuGradientPlan& portable = portable_gradients(g);
  if (!boxes && portable.keys.family == GpuKernels::plain) {
    add(Kernel::plain_delta);
    if (call.grad_query) add(Kernel::plain_queries);
    if (call.grad_keys) add(Kernel::plain_keys);
    if (p.additional_tokens > 0 && call.grad_additional) add(Kernel::plain_additional);
    if (p.rpb && call.grad_bias) add(Kernel::plain_bias);
    if (rest && (call.grad_query || call.grad_keys)) add(Kernel::packed_rest);
    return list;
  }
  if (boxes) {
    const bool summed = g.backward.add_queries && call.grad_query;
    const Kernel own = g.backward.queries.family == GpuKernels::warpgroups ? Kernel::sm90_queries : Kernel::queries;
    const Spec queries = call.grad_query && !summed ? of(own) : Spec{};
    if (!queries.makes_statistics()) add(Kernel::delta);
    if (call.grad_query && !summed) list.add(queries);
    if (call.grad_keys || summed) add(Kernel::sm90_keys);
    if (call.grad_values && g.backward.values.tile.rows > 0) add(Kernel::sm90_values);
    if (g.backward.keys.key_parts > 1 && call.grad_keys) add(Kernel::convert_keys);
    if (summed) add(Kernel::convert);
    if (p.additional_tokens > 0 && call.grad_additional) add(Kernel::additional);
    if (rest && (call.grad_query || call.grad_keys)) add(Kernel::packed_rest);
    return list;
  }
  const bool summed = portable.add_queries && call.grad_query;  // by the kernels of keys
  const bool own = !portable.add_queries && call.grad_query;
  const Spec queries = own ? of(Kernel::queries) : Spec{};
  if (!queries.makes_statistics()) add(Kernel::delta);
  if (own) list.add(queries);
  if (call.grad_keys || summed) add(Kernel::keys);
  if (p.additional_tokens > 0 && (call.grad_additional || summed)) add(Kernel::additional);
  if (summed) add(Kernel::convert);
  if (p.rpb && call.grad_bias) add(Kernel::bias);
  if (rest && (call.grad_query || call.grad_keys)) add(Kernel::packed_rest);
  return list;
}

std::vector<Spec> kernels_of(const Plan& plan, const CallSet& calls) {
  const Problem& p = plan.problem;
  const bool can_align = gpu::can_align(p);
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
      if (!calls.forward || calls.logsumexp.value_or(logsumexp) != logsumexp) continue;
      // The copy engine may address the tensors of one call and not those of another.
      for (const bool boxes : {true, false}) {
        call.boxes = boxes && vectors;
        add(call);
      }
    }
    call.backward = true;
    for (const bool boxes : {true, false}) {
      call.boxes = boxes && vectors;
      // Without the query's gradient others may make what its kernel makes.
      for (const bool grad_query : {true, false}) {
        call.grad_query = grad_query;
        if (calls.backward) add(call);
      }
    }
  }
  return list;
}

}  // namespace vicus::gpu
