#include "cpu/backward.h"

#include <algorithm>
#include <cstring>

#include "core/elements.h"
#include "core/engines.h"
#include "core/numbers.h"
#include "cpu/parallel.h"

namespace vicus::cpu {
namespace {

/// Most slots of rpb tables over all heads: enough for any number of threads to have work.
constexpr std::int64_t kRpbSlots = 64;

/// Keys that no cell holds, because their sequence is padded, have zero gradients.
void clear_padding(const TensorView& gradient, const Dense& mask) {
  const std::size_t row_bytes = static_cast<std::size_t>(gradient.size(3)) * dtype_size(gradient.dtype());
  for (std::size_t b = 0; b < mask.key_lengths.size(); ++b) {
    for (std::int64_t k = mask.key_lengths[b]; k < mask.keys; ++k) {
      for (std::int64_t h = 0; h < gradient.size(2); ++h) {
        const std::int64_t offset =
            static_cast<std::int64_t>(b) * gradient.stride(0) + k * gradient.stride(1) + h * gradient.stride(2);
        std::memset(
            static_cast<std::byte*>(gradient.data()) + offset * static_cast<std::int64_t>(dtype_size(gradient.dtype())),
            0, row_bytes);
      }
    }
  }
}

void store_rpb(const BackwardContext& c) {
  const Problem& p = c.problem;
  const std::int64_t group = p.heads / p.heads_kv;
  const TensorView& out = c.out.rpb;
  for (std::int64_t head = 0; head < p.heads; ++head) {
    for_each_element(first_slice(out), [&](std::int64_t i, std::int64_t offset) {
      double sum = 0;
      for (std::int64_t slot = 0; slot < c.rpb_slots; ++slot) {
        const std::int64_t table = ((head / group) * c.rpb_slots + slot) * group + head % group;
        sum += c.rpb_sums[static_cast<std::size_t>(table * c.rpb_table + i)];
      }
      store_element(out.data(), out.dtype(), head * out.stride(0) + offset, sum);
    });
  }
}

}  // namespace

std::int64_t segment_tile_count(const BackwardPlan& plan) {
  return std::int64_t{1} * plan.segment_heads * plan.segment[0] * plan.segment[1] * plan.segment[2];
}

BackwardContext::BackwardContext(const Plan& the_plan, const AttentionInputs& inputs,
                                 const AttentionGradInputs& grad_inputs, const AttentionGradients& gradients)
    : plan(the_plan),
      problem(the_plan.problem),
      in(inputs),
      grads(grad_inputs),
      out(gradients),
      domain(problem),
      layout(problem, plan.backward, segment_tile_count(plan.backward)) {
  const BackwardPlan& b = plan.backward;
  const int head_tiles = geometry::ceil_div(static_cast<int>(problem.heads / problem.heads_kv), b.tile.heads);
  segments = CellTasks(domain, [&](const Cell& cell) {
    std::int64_t n = geometry::ceil_div(head_tiles, b.segment_heads);
    for (std::size_t a = 0; a < geometry::kRank; ++a) {
      n *= geometry::ceil_div(geometry::ceil_div(cell.grid.axis[a].queries, b.tile.extent[a]), b.segment[a]);
    }
    return n;
  });
  blocks = CellTasks(domain, [&](const Cell& cell) {
    std::int64_t n = 1;
    for (std::size_t a = 0; a < geometry::kRank; ++a) n *= geometry::ceil_div(cell.grid.axis[a].keys, b.kv_block[a]);
    return n;
  });
  segment_tasks = segments.total() * problem.heads_kv;
  if (out.rpb) {
    std::int64_t table = 1;
    for (int a = 0; a < problem.rank(); ++a) table *= out.rpb.size(1 + a);
    rpb_table = table;
    rpb_slots = std::clamp<std::int64_t>(kRpbSlots / problem.heads_kv, 1, std::max<std::int64_t>(segments.total(), 1));
    segment_tasks = problem.heads_kv * rpb_slots;
    rpb_sums.assign(static_cast<std::size_t>(problem.heads * rpb_slots * table), 0.0);
  }
  if (b.relay) past = std::vector<std::atomic<int>>(static_cast<std::size_t>(segment_tasks));
  const bool key_gradients = out.key || out.value;
  if (key_gradients && b.border_blocks > 0) border_tasks = blocks.total() * problem.heads_kv;
  if (problem.additional_tokens > 0 && (out.additional_keys || out.additional_values)) {
    const auto block = static_cast<std::int64_t>(layout.capacity);
    additional_blocks = (problem.additional_tokens + block - 1) / block;
    additional_tasks = problem.batch * problem.heads_kv * additional_blocks;
  }
}

void backward(const Plan& plan, const AttentionInputs& in, const AttentionGradInputs& grads,
              const AttentionGradients& out) {
  BackwardContext context(plan, in, grads, out);
  if (const auto* dense = std::get_if<Dense>(&plan.problem.mask)) {
    if (out.key) clear_padding(out.key, *dense);
    if (out.value) clear_padding(out.value, *dense);
  }
  const auto task = plan.problem.dtype == DType::float64 ? backward_task_f64 : backward_task_f32;
  parallel_tasks(plan.threads, context.tasks(), context.layout.bytes,
                 [&](std::int64_t index, std::byte* scratch) { task(context, index, scratch); });
  if (out.rpb) store_rpb(context);
}

}  // namespace vicus::cpu
