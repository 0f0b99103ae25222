// Plans problems for GPUs of every supported kind, compiles the kernels and prints what the compiler says of them, one JSON
// object a line.
//
//   gpu_specs PART PARTS     every PARTS-th problem, from PART
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gpu/spec.h"
#include "jit/compile.h"
#include "vicus/vicus.hpp"

namespace vicus {
namespace {

struct Case {
  std::string name;
  Problem problem;
  bool vectors = true;
  DType bias_type = DType::float32;
};

Problem sized(DType dtype, std::int64_t batch, AxisValues layout, std::int64_t heads, std::int64_t heads_kv,
              std::int64_t head_dim, std::int64_t head_dim_v) {
  Problem p;
  p.dtype = dtype;
  p.batch = batch;
  p.layout = layout;
  p.heads = heads;
  p.heads_kv = heads_kv;
  p.head_dim = head_dim;
  p.head_dim_v = head_dim_v;
  return p;
}

std::vector<Case> cases() {
  std::vector<Case> list;
  constexpr auto kHalf = DType::float16;
  constexpr auto kBrain = DType::bfloat16;
  const auto dense = [&](const std::string& name, Problem p, Dense mask) {
    mask.keys = 1000;
    p.mask = mask;
    list.push_back({"dense " + name, p});
  };
  for (const std::int64_t d : {16, 32, 64, 80, 96, 128, 192, 256}) {
    dense("D" + std::to_string(d), sized(d % 32 == 0 ? kBrain : kHalf, 2, {1000}, 4, 2, d, d), {});
    dense("causal D" + std::to_string(d), sized(kBrain, 2, {1000}, 4, 4, d, d), {.causal = Causal::bottom_right});
  }
  dense("D64/128", sized(kBrain, 2, {1000}, 4, 4, 64, 128), {.causal = Causal::top_left});
  dense("D192/128", sized(kBrain, 2, {1000}, 4, 4, 192, 128), {});
  dense("sliding", sized(kBrain, 2, {1000}, 8, 1, 64, 64), {.window_left = 100, .window_right = 7});
  dense("one query", sized(kBrain, 2, {1}, 8, 1, 128, 128), {});
  Problem odd = sized(kHalf, 2, {1000}, 4, 4, 41, 23);
  Dense mask;
  mask.keys = 1000;
  odd.mask = mask;
  list.push_back({"dense odd", odd, false});
  odd.additional_tokens = 9;
  odd.attn_bias = true;
  list.push_back({"dense odd biased", odd, false, DType::float64});
  const auto near = [&](const std::string& name, Problem p, const Neighborhood& windows) {
    p.mask = windows;
    list.push_back({"neighborhood " + name, p});
    p.additional_tokens = 5;
    p.rpb = true;
    list.push_back({"neighborhood biased " + name, p, true, p.dtype});
  };
  for (const std::int64_t d : {32, 64, 128, 256}) {
    const std::string of = " D" + std::to_string(d);
    near("1-D" + of, sized(kBrain, 1, {4000}, 4, 4, d, d), {.kernel_size = 255, .is_causal = 1});
    near("2-D" + of, sized(kBrain, 16, {56, 56}, 4, 4, d, d), {.kernel_size = 7});
    near("3-D" + of, sized(kHalf, 2, {8, 32, 32}, 8, 2, d, d),
         {.kernel_size = {4, 8, 8}, .stride = {1, 2, 1}, .dilation = {1, 1, 2}, .is_causal = {1, 0, 0}});
  }
  near("wide", sized(kBrain, 1, {256, 256}, 24, 24, 128, 128), {.kernel_size = 80, .stride = 16});
  near("video", sized(kBrain, 1, {30, 48, 80}, 24, 24, 128, 128), {.kernel_size = {18, 24, 24}});
  return list;
}

void compile(const Case& c, const GpuTarget& target, const Plan& plan, gpu::Kernel kernel) {
  const gpu::Spec spec = gpu::spec_of(plan, kernel, true, c.vectors, c.bias_type);
  jit::CompileReport report;
  (void)jit::cubin(gpu::source_of(spec), {target.major, target.minor}, &report);
  std::cout << nlohmann::json{{"name", c.name},
                              {"kernel", jit::name_of(gpu::source_of(spec))},
                              {"atomics", plan.gpu.add_queries},
                              {"arch", std::to_string(target.major) + "." + std::to_string(target.minor)},
                              {"registers", report.registers},
                              {"spill_bytes", report.spill_store_bytes + report.spill_load_bytes},
                              {"stack_bytes", report.stack_bytes},
                              {"shared_bytes", gpu::shared_bytes(spec)},
                              {"shared_limit", target.shared_bytes_per_block},
                              {"threads", spec.threads()},
                              {"blocks_per_multiprocessor", spec.min_blocks},
                              {"work_ratio", plan.gpu.forward.work.ratio()}}
                   .dump()
            << "\n";
}

}  // namespace
}  // namespace vicus

int main(int argc, char** argv) {
  using namespace vicus;  // NOLINT(google-build-using-namespace): the program is of one namespace
  if (argc != 3) return 2;
  const std::size_t part = std::strtoul(argv[1], nullptr, 10), parts = std::strtoul(argv[2], nullptr, 10);
  // Compute capability, multiprocessors and shared memory of an A100, L4, H100, B200 and RTX 5090.
  const GpuTarget targets[] = {
      {8, 0, 108, 166912}, {8, 9, 58, 101376}, {9, 0, 132, 232448}, {10, 0, 148, 232448}, {12, 0, 170, 101376}};
  const std::vector<Case> all = cases();
  for (std::size_t i = part; i < all.size(); i += parts) {
    const GpuTarget& target = targets[i / parts % std::size(targets)];
    for (const bool deterministic : {false, true}) {
      PlanOptions options = {.engine = Engine::sm80, .gpu = target};
      options.backward.deterministic = deterministic;
      const Plan plan = choose_plan(all[i].problem, options);
      using gpu::Kernel;
      if (!deterministic) compile(all[i], target, plan, Kernel::forward);
      if (plan.gpu.backward_keys.tile.rows == 0) continue;  // too little shared memory
      if (deterministic) compile(all[i], target, plan, Kernel::queries);
      if (!deterministic) compile(all[i], target, plan, Kernel::convert);
      compile(all[i], target, plan, Kernel::keys);
      if (all[i].problem.additional_tokens > 0) compile(all[i], target, plan, Kernel::additional);
      if (deterministic) compile(all[i], target, plan, Kernel::delta);
      if (deterministic && all[i].problem.rpb) compile(all[i], target, plan, Kernel::bias);
    }
  }
}
