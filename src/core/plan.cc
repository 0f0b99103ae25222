#include "vicus/plan.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <string>

#include "core/domain.h"
#include "core/families.h"
#include "core/log.h"
#include "cpu/engine.h"
#include "cpu/planner.h"
#include "cpu/threads.h"
#include "gpu/planner.h"
#include "vicus/error.h"

namespace vicus {
namespace {

struct EngineName {
  Engine engine;
  std::string_view name;
};
constexpr std::array kEngines = {EngineName{Engine::automatic, "auto"}, EngineName{Engine::reference, "reference"},
                                 EngineName{Engine::cpu, "cpu"}, EngineName{Engine::sm80, "sm80"},
                                 EngineName{Engine::sm90, "sm90"}};

constexpr int kMaxThreads = 1024;

double tensor_bytes(const Problem& p, double tokens, std::int64_t heads, std::int64_t width) {
  return tokens * static_cast<double>(heads * width) * static_cast<double>(dtype_size(p.dtype));
}

std::string extent_text(const std::array<int, 3>& extent, int rank) {
  std::string text;
  for (int i = 3 - rank; i < 3; ++i) {
    if (!text.empty()) text += 'x';
    text += std::to_string(extent[static_cast<std::size_t>(i)]);
  }
  return text;
}

std::string bounds_text(const DeviceLengths& of) {
  if (!of.any()) return "";
  const std::string longest = of.sequences == 0 ? ""
                                                : " of at most " + std::to_string(of.max_queries) + " queries and " +
                                                      std::to_string(of.max_keys) + " keys";
  return longest + " (lengths come with each call: work is counted for the longest)";
}

template <class... Args>
std::string format(const char* pattern, Args... args) {
  std::array<char, 256> line{};
  std::snprintf(line.data(), line.size(), pattern, args...);
  return line.data();
}

std::string describe(const GpuKernelPlan& kernel, const char* name, int rank, const char* shared = "keys") {
  if (kernel.tile.rows == 0) return "";
  return format("%-8s %s, query tile %s of %d heads, key tile %s, %d rows in %d warps, %d in flight\n", name,
                std::string(kernels_name(kernel.family)).c_str(), extent_text(kernel.tile.extent, rank).c_str(),
                kernel.tile.heads, extent_text(kernel.kv_tile, rank).c_str(), kernel.tile.rows, kernel.warps,
                kernel.stages) +
         (kernel.warp_tile[0] > 0
              ? format("         a warp takes %s queries and %s keys of a tile\n",
                       extent_text(kernel.warp_tile, rank).c_str(), extent_text(kernel.warp_keys, rank).c_str())
              : std::string()) +
         (kernel.key_parts > 1 ? format("         %s in %d parts, merged afterwards\n", shared, kernel.key_parts)
                               : std::string()) +
         format("         work ratio %.3f, %lld blocks, %d on a multiprocessor, %d bytes of shared memory\n",
                kernel.work.ratio(), static_cast<long long>(kernel.blocks), kernel.blocks_per_multiprocessor,
                kernel.shared_bytes);
}

std::string describe(const std::vector<TileCandidate>& candidates, int rank) {
  if (candidates.empty()) return "";
  const bool gpu = candidates.front().kv_tile[0] > 0;
  const double best = candidates.front().cost;
  std::string text =
      gpu ? "tiles considered (rows, extent, heads, key tile, parts of the keys, work ratio, relative cost)\n"
          : "tiles considered (rows, extent, heads, work ratio, relative cost)\n";
  for (const TileCandidate& c : candidates) {
    text += format("         %3d %-10s x%-3d", c.tile.rows, extent_text(c.tile.extent, rank).c_str(), c.tile.heads);
    if (gpu) text += format(" %-10s /%-3d", extent_text(c.kv_tile, rank).c_str(), c.key_parts);
    text += format(" %.3f  %.3f\n", c.work_ratio, best > 0 ? c.cost / best : 1.0);
  }
  return text;
}

std::string describe(const GpuGradientPlan& plan, const char* queries, const char* keys, int rank) {
  if (plan.keys.tile.rows == 0) return "";
  const bool apart = plan.values.tile.rows > 0;
  return describe(plan.queries, queries, rank) + describe(plan.keys, apart ? "dk" : keys, rank, "heads") +
         describe(plan.values, "dv", rank, "heads") +
         format("scratch  %.4g MB for gradients%s\n", static_cast<double>(plan.scratch_bytes) * 1e-6,
                plan.add_queries ? ", dq summed by the kernel for keys" : "");
}

std::string describe(const GpuPlan& plan, int rank) {
  std::string text;
  if (!plan.reason.empty()) text.append("kernels  ").append(plan.reason).append("\n");
  return text + describe(plan.forward, "forward", rank) + describe(plan.forward_unboxed, "or else", rank) +
         describe(plan.backward, "dq", "dk, dv", rank) + describe(plan.backward_unboxed, "else dq", "dk, dv", rank);
}

}  // namespace

std::string_view engine_name(Engine engine) noexcept {
  for (const EngineName& e : kEngines) {
    if (e.engine == engine) return e.name;
  }
  return "unknown";
}

std::string_view kernels_name(GpuKernels kernels) noexcept {
  switch (kernels) {
    case GpuKernels::tensor_cores:
      return "tensor cores";
    case GpuKernels::warpgroups:
      return "warpgroups";
    default:
      return "plain";
  }
}

Engine parse_engine(std::string_view name, const std::string& argument) {
  for (const EngineName& e : kEngines) {
    if (e.name == name) return e.engine;
  }
  throw InvalidArgument(argument, "'" + std::string(name) + "'", "auto, reference, cpu, sm80, sm90");
}

std::string supports(const Problem& problem, Engine engine) {
  if (engine == Engine::sm80) return gpu::supports(problem);
  if (engine == Engine::sm90) return gpu::supports_boxes(problem);
  if (const auto* dense = std::get_if<Dense>(&problem.mask); dense != nullptr && dense->device.any()) {
    return "lists in memory of a GPU (device) are for engine sm80; engines of the CPU take cumulative_queries, "
           "cumulative_keys and key_lengths";
  }
  if (engine == Engine::cpu && cpu::targets_available().empty()) {
    return "engine cpu needs SSE4.2 (x86) or NEON (Arm), which this machine lacks; engine reference runs anywhere";
  }
  return "";
}

namespace {

std::int64_t kv_splits_allowed(const Problem& p, const BackwardOptions& options) {
  if (options.deterministic || !options.kv_parallelism) return 1;
  if (options.kv_splits != std::array<int, 3>{}) {
    std::int64_t wanted = 1;
    for (const int splits : options.kv_splits) wanted *= std::max(splits, 1);
    return wanted;
  }
  constexpr std::int64_t kMost = 65535, kBalanced = 4096, kStrict = 1024;
  if (options.memory == MemoryPreference::unrestricted) return kMost;
  const std::int64_t tasks = options.memory == MemoryPreference::strict ? kStrict : kBalanced;
  const double parallel = static_cast<double>(Domain(p).size()) * static_cast<double>(p.heads);
  return std::max(static_cast<std::int64_t>(static_cast<double>(tasks) / std::max(parallel, 1.0)), std::int64_t{1});
}

void check(const BackwardOptions& options) {
  constexpr int kMostSplits = 65535;
  for (std::size_t a = 0; a < 3; ++a) {
    const int splits = options.kv_splits[a];
    if (splits < 0 || splits > kMostSplits) {
      throw InvalidArgument("kv_splits[" + std::to_string(a) + "]", std::to_string(splits),
                            "0 to " + std::to_string(kMostSplits));
    }
  }
}

}  // namespace

Plan choose_plan(const Problem& problem, const PlanOptions& options) {
  Plan plan;
  plan.problem = validate(problem);
  const Problem& p = plan.problem;
  if (options.threads < 0 || options.threads > kMaxThreads) {
    throw InvalidArgument("threads", std::to_string(options.threads), "0 to " + std::to_string(kMaxThreads));
  }
  check(options.backward);
  plan.threads = options.threads > 0 ? options.threads : cpu::max_threads();
  plan.backward.options = options.backward;
  plan.backward.kv_splits_allowed = kv_splits_allowed(p, options.backward);
  if (options.engine == Engine::automatic && options.gpu.major > 0) {
    if (const std::string why_not = supports(p, Engine::sm80); !why_not.empty()) throw Unsupported(why_not);
    plan.engine = Engine::sm80;  // or better: gpu::plan_problem
    plan.reason = "takes every problem of a GPU";
  } else if (options.engine == Engine::automatic) {
    const std::string why_not = supports(p, Engine::cpu);
    if (const std::string none = supports(p, Engine::reference); !none.empty()) throw Unsupported(none);
    plan.engine = why_not.empty() ? Engine::cpu : Engine::reference;
    plan.reason = why_not.empty() ? "the fastest engine that takes the problem" : why_not;
  } else {
    const std::string why_not = supports(p, options.engine);
    if (!why_not.empty()) throw Unsupported(why_not);
    plan.engine = options.engine;
    plan.reason = "asked for";
  }

  const auto heads = static_cast<double>(p.heads);
  double pairs = 0;
  for (const Family& family : families(p)) {
    pairs +=
        family.sum([](int, const geometry::Axis& axis) { return static_cast<double>(geometry::mask_pairs(axis)); });
  }
  const double queries = static_cast<double>(p.batch) * static_cast<double>(p.queries());
  plan.mask_pairs = heads * (pairs + queries * static_cast<double>(p.additional_tokens));
  plan.forward_flops = 2.0 * static_cast<double>(p.head_dim + p.head_dim_v) * plan.mask_pairs;
  plan.backward_flops = 2.0 * static_cast<double>(3 * p.head_dim + 2 * p.head_dim_v) * plan.mask_pairs;
  const double keys = static_cast<double>(p.batch) * static_cast<double>(p.keys() + p.additional_tokens);
  const double q_bytes = tensor_bytes(p, queries, p.heads, p.head_dim);
  const double o_bytes = tensor_bytes(p, queries, p.heads, p.head_dim_v);
  const double kv_bytes = tensor_bytes(p, keys, p.heads_kv, p.head_dim + p.head_dim_v);
  const double lse_bytes = queries * heads * (p.dtype == DType::float64 ? 8 : 4);
  plan.forward_bytes = q_bytes + o_bytes + kv_bytes + lse_bytes;
  plan.backward_bytes = 2 * q_bytes + 2 * o_bytes + 2 * kv_bytes + lse_bytes;

  // Waking a thread costs about as much as a million operations.
  const double worth = std::max(plan.forward_flops * 1e-6, 1.0);
  if (options.threads == 0 && worth < plan.threads) plan.threads = static_cast<int>(worth);
  if (plan.engine == Engine::cpu) cpu::plan_problem(plan, options);
  if (runs_on_gpu(plan.engine)) gpu::plan_problem(plan, options);
  if (log_wanted(LogLevel::debug)) {
    std::string text = describe(plan);
    text.pop_back();  // a message has no line end
    log(LogLevel::debug, text);
  }
  return plan;
}

std::string describe(const Plan& plan) {
  const Problem& p = plan.problem;
  const int rank = p.rank();
  std::string text;
  text += format("engine %s (%s), %d threads, %s\n", std::string(engine_name(plan.engine)).c_str(), plan.reason.c_str(),
                 plan.threads, std::string(dtype_name(p.dtype)).c_str());
  if (const auto* mask = std::get_if<Neighborhood>(&p.mask)) {
    text += "problem  neighborhood, batch " + std::to_string(p.batch) + ", layout " + p.layout.text() +
            ", kernel_size " + mask->kernel_size.text() + ", stride " + mask->stride.text() + ", dilation " +
            mask->dilation.text() + ", is_causal " + mask->is_causal.text() + "\n";
  } else {
    const auto& dense = std::get<Dense>(p.mask);
    constexpr std::array kCausal = {"no", "top-left", "bottom-right"};
    text += "problem  dense, batch " + std::to_string(p.batch) + ", queries " + std::to_string(p.queries()) +
            ", keys " + std::to_string(dense.keys) + ", causal " + kCausal[static_cast<std::size_t>(dense.causal)] +
            ", window (" + std::to_string(dense.window_left) + ", " + std::to_string(dense.window_right) + ")" +
            (dense.packed() ? ", packed sequences " + std::to_string(dense.sequences()) : "") +
            (dense.padded() ? ", padded keys" : "") + bounds_text(dense.device) + "\n";
  }
  text +=
      format("         heads %lld over %lld, head_dim %lld, head_dim_v %lld, additional tokens %lld\n",
             static_cast<long long>(p.heads), static_cast<long long>(p.heads_kv), static_cast<long long>(p.head_dim),
             static_cast<long long>(p.head_dim_v), static_cast<long long>(p.additional_tokens));
  text += format("work     %.6g pairs in the mask; forward %.4g GFLOP, backward %.4g GFLOP\n", plan.mask_pairs,
                 plan.forward_flops * 1e-9, plan.backward_flops * 1e-9);
  text += format("bytes    forward %.4g MB, backward %.4g MB (each tensor once)\n", plan.forward_bytes * 1e-6,
                 plan.backward_bytes * 1e-6);
  text +=
      format("backward %s, keys in %lld parts of at most %lld\n",
             plan.backward.kv_splits == 1 ? "bit-exact from run to run" : "sums in no fixed order",
             static_cast<long long>(plan.backward.kv_splits), static_cast<long long>(plan.backward.kv_splits_allowed));
  if (runs_on_gpu(plan.engine)) return text + describe(plan.gpu, rank) + describe(plan.candidates, rank);
  if (plan.engine != Engine::cpu) return text;
  const ForwardPlan& f = plan.forward;
  text += format("forward  query tile %s of %d heads in %d rows, %s%s %s of %d head tiles, %d keys packed, %d a step\n",
                 extent_text(f.tile.extent, rank).c_str(), f.tile.heads, f.tile.rows,
                 f.roll_axis >= 0 ? "rolling stack" : "stack", f.fold_axis >= 0 ? " with folded windows" : "",
                 extent_text(f.stack, rank).c_str(), f.stack_heads, f.pack_keys, f.chunk_keys);
  text += format("         work ratio %.3f, %lld tasks, %.3f MiB scratch a thread\n", f.work.ratio(),
                 static_cast<long long>(f.tasks), static_cast<double>(f.scratch_bytes) / 1048576.0);
  const BackwardPlan& b = plan.backward;
  text += format("backward query tile %s of %d heads in %d rows, key block %s, %d keys a step\n",
                 extent_text(b.tile.extent, rank).c_str(), b.tile.heads, b.tile.rows,
                 extent_text(b.kv_block, rank).c_str(), b.chunk_keys);
  text += format(
      "         work ratio %.3f, %lld segments of %s tiles of %d head tiles%s, %lld border blocks, %.3f MiB "
      "scratch a thread\n",
      b.work.ratio(), static_cast<long long>(b.segments), extent_text(b.segment, rank).c_str(), b.segment_heads,
      b.relay ? " handing key blocks on" : "", static_cast<long long>(b.border_blocks),
      static_cast<double>(b.scratch_bytes) / 1048576.0);
  return text + describe(plan.candidates, rank);
}

}  // namespace vicus
