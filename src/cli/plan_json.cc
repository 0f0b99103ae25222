#include "cli/plan_json.h"

#include <string_view>
#include <utility>

namespace vicus::cli {
namespace {

Json to_json(const AxisValues& values, int rank) {
  Json list = Json::array();
  for (int axis = 0; axis < rank; ++axis) list.push_back(values[axis]);
  return list;
}

std::string_view name_of(Causal causal) {
  switch (causal) {
    case Causal::none:
      return "none";
    case Causal::top_left:
      return "top-left";
    case Causal::bottom_right:
      return "bottom-right";
  }
  return "";
}

Json to_json(const Neighborhood& mask, int rank) {
  return {{"kind", "neighborhood"},
          {"kernel_size", to_json(mask.kernel_size, rank)},
          {"stride", to_json(mask.stride, rank)},
          {"dilation", to_json(mask.dilation, rank)},
          {"is_causal", to_json(mask.is_causal, rank)}};
}

Json to_json(const Dense& mask) {
  return {{"kind", "dense"},
          {"keys", mask.keys},
          {"causal", name_of(mask.causal)},
          {"window_left", mask.window_left},
          {"window_right", mask.window_right},
          {"key_lengths", mask.key_lengths},
          {"cumulative_queries", mask.cumulative_queries},
          {"cumulative_keys", mask.cumulative_keys},
          {"device",
           {{"sequences", mask.device.sequences},
            {"max_queries", mask.device.max_queries},
            {"max_keys", mask.device.max_keys},
            {"key_lengths", mask.device.key_lengths}}}};
}

Json to_json(const QueryTile& tile) { return {{"rows", tile.rows}, {"heads", tile.heads}, {"extent", tile.extent}}; }

Json to_json(const Work& work) {
  return {{"mask_pairs", work.mask_pairs}, {"tile_pairs", work.tile_pairs}, {"ratio", work.ratio()}};
}

Json to_json(const ForwardPlan& plan) {
  return {{"tile", to_json(plan.tile)},    {"stack", plan.stack},         {"stack_heads", plan.stack_heads},
          {"roll_axis", plan.roll_axis},   {"fold_axis", plan.fold_axis}, {"pack_keys", plan.pack_keys},
          {"chunk_keys", plan.chunk_keys}, {"tasks", plan.tasks},         {"scratch_bytes", plan.scratch_bytes},
          {"work", to_json(plan.work)}};
}

Json to_json(const BackwardPlan& plan) {
  return {{"kv_splits", plan.kv_splits},
          {"kv_splits_allowed", plan.kv_splits_allowed},
          {"tile", to_json(plan.tile)},
          {"kv_block", plan.kv_block},
          {"chunk_keys", plan.chunk_keys},
          {"segment", plan.segment},
          {"segment_heads", plan.segment_heads},
          {"segments", plan.segments},
          {"relay", plan.relay},
          {"fold_axis", plan.fold_axis},
          {"keep_queries", plan.keep_queries},
          {"border_blocks", plan.border_blocks},
          {"scratch_bytes", plan.scratch_bytes},
          {"work", to_json(plan.work)}};
}

Json to_json(const GpuKernelPlan& plan) {
  Json json = {{"family", kernels_name(plan.family)},
               {"tile", to_json(plan.tile)},
               {"kv_tile", plan.kv_tile},
               {"warps", plan.warps},
               {"stages", plan.stages},
               {"blocks", plan.blocks},
               {"blocks_per_multiprocessor", plan.blocks_per_multiprocessor},
               {"shared_bytes", plan.shared_bytes},
               {"work", to_json(plan.work)}};
  if (plan.family == GpuKernels::plain) {
    json["thread_rows"] = plan.thread_rows;
    json["depth"] = plan.depth;
    json["wide"] = plan.wide;
  } else if (plan.family == GpuKernels::warpgroups) {
    json["stack_axis"] = plan.stack_axis;
    json["ping_pong"] = plan.ping_pong;
    json["key_parts"] = plan.key_parts;
    json["heads_in_turns"] = plan.heads_in_turns;
    json["heads_inside"] = plan.heads_inside;
  } else {
    json["row_blocks"] = plan.row_blocks;
    json["turns"] = plan.turns;
    json["chunk"] = plan.chunk;
    json["splits"] = plan.splits;
    json["hold"] = plan.hold;
    if (plan.warp_tile[0] > 0) {
      json["warp_tile"] = plan.warp_tile;
      json["warp_keys"] = plan.warp_keys;
    }
  }
  return json;
}

}  // namespace

Json to_json(const Problem& problem) {
  const int rank = problem.rank();
  const auto* neighborhood = std::get_if<Neighborhood>(&problem.mask);
  return {{"dtype", dtype_name(problem.dtype)},
          {"batch", problem.batch},
          {"layout", to_json(problem.layout, rank)},
          {"heads", problem.heads},
          {"heads_kv", problem.heads_kv},
          {"head_dim", problem.head_dim},
          {"head_dim_v", problem.head_dim_v},
          {"scale", problem.effective_scale()},
          {"additional_tokens", problem.additional_tokens},
          {"rpb", problem.rpb},
          {"attn_bias", problem.attn_bias},
          {"mask", neighborhood != nullptr ? to_json(*neighborhood, rank) : to_json(std::get<Dense>(problem.mask))}};
}

Json to_json(const Plan& plan) {
  Json json = {{"problem", to_json(plan.problem)},
               {"engine", engine_name(plan.engine)},
               {"reason", plan.reason},
               {"threads", plan.threads},
               {"mask_pairs", plan.mask_pairs},
               {"forward_flops", plan.forward_flops},
               {"backward_flops", plan.backward_flops},
               {"forward_bytes", plan.forward_bytes},
               {"backward_bytes", plan.backward_bytes}};
  if (!plan.candidates.empty()) json["candidates"] = Json::array();
  for (const TileCandidate& candidate : plan.candidates) {
    Json c = {{"tile", to_json(candidate.tile)}, {"work_ratio", candidate.work_ratio}, {"cost", candidate.cost}};
    if (runs_on_gpu(plan.engine)) {
      c["kv_tile"] = candidate.kv_tile;
      c["key_parts"] = candidate.key_parts;
    }
    json["candidates"].push_back(std::move(c));
  }
  if (runs_on_gpu(plan.engine)) {
    json["forward"] = to_json(plan.gpu.forward);
    json["forward"]["scratch_bytes"] = plan.gpu.forward_scratch_bytes;
    json["backward"] = {{"add_queries", plan.gpu.backward.add_queries},
                        {"scratch_bytes", plan.gpu.backward.scratch_bytes},
                        {"keys", to_json(plan.gpu.backward.keys)}};
    if (plan.gpu.backward.values.tile.rows > 0) json["backward"]["values"] = to_json(plan.gpu.backward.values);
    if (!plan.gpu.backward.add_queries) json["backward"]["queries"] = to_json(plan.gpu.backward.queries);
    json["without_tensor_cores"] = plan.gpu.reason;
  }
  if (plan.engine != Engine::cpu) return json;  // the fields below are those of the tiled engine
  json["forward"] = to_json(plan.forward);
  json["backward"] = to_json(plan.backward);
  return json;
}

}  // namespace vicus::cli
