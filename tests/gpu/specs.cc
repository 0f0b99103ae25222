// Plans problems for GPUs of every supported kind, compiles the kernels and prints what the compiler says of them, one JSON
// object a line.
//
//   gpu_specs PART PARTS     every PARTS-th problem, from PART
#include <array>
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
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
    const std::string of = std::to_string(d);
    dense("D" + of, sized(d % 32 == 0 ? kBrain : kHalf, 2, {1000}, 4, 2, d, d), {});
    dense("causal D" + of, sized(kBrain, 2, {1000}, 4, 4, d, d), {.causal = Causal::bottom_right});
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
  near("long lines", sized(kBrain, 1, {256, 256}, 24, 24, 64, 64), {.kernel_size = 80});
  near("wide", sized(kBrain, 1, {256, 256}, 24, 24, 128, 128), {.kernel_size = 80, .stride = 16});
  near("video", sized(kBrain, 1, {30, 48, 80}, 24, 24, 128, 128), {.kernel_size = {18, 24, 24}});
  return list;
}

// Problems for plain kernels: other dtypes, long head dims.
std::vector<Case> plain_cases() {
  std::vector<Case> list;
  constexpr DType kAll[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};
  const auto dense = [&](const std::string& name, Problem p, Dense mask, bool vectors = true) {
    mask.keys = 1000;
    p.mask = mask;
    list.push_back({"dense " + name, p, vectors, p.dtype});
  };
  for (const DType dtype : kAll) {
    const std::string name(dtype_name(dtype));
    dense(name + " D512", sized(dtype, 2, {1000}, 4, 2, 512, 512), {.causal = Causal::bottom_right});
    Problem biased = sized(dtype, 2, {1000}, 4, 1, 300, 41);
    biased.additional_tokens = 9;
    biased.attn_bias = true;
    dense(name + " odd biased", biased, {}, false);
  }
  for (const DType dtype : {DType::float32, DType::float64}) {
    const std::string name(dtype_name(dtype));
    for (const std::int64_t d : {32, 64, 96, 128, 256}) {
      dense(name + " D" + std::to_string(d), sized(dtype, 2, {1000}, 4, 4, d, d), {.causal = Causal::top_left});
    }
    Problem more = sized(dtype, 2, {1000}, 4, 4, 128, 128);
    more.additional_tokens = 9;
    dense(name + " and more", more, {.causal = Causal::bottom_right});
    dense(name + " one query", sized(dtype, 2, {1}, 8, 1, 128, 128), {});
    dense(name + " sliding, odd", sized(dtype, 2, {1000}, 8, 1, 41, 23), {.window_left = 100, .window_right = 7},
          false);
    for (int rank = 1; rank <= 3; ++rank) {
      Problem p = sized(dtype, 2,
                        rank == 1   ? AxisValues{500}
                        : rank == 2 ? AxisValues{56, 56}
                                    : AxisValues{8, 16, 16},
                        4, 2, 64, 64);
      p.mask = Neighborhood{.kernel_size = rank == 1   ? AxisValues{31}
                                           : rank == 2 ? AxisValues{7, 9}
                                                       : AxisValues{3, 5, 5},
                            .stride = rank == 1 ? 3 : 1,
                            .dilation = rank == 2 ? 2 : 1,
                            .is_causal = rank == 3 ? 1 : 0};
      list.push_back({"neighborhood " + name + " " + std::to_string(rank) + "-D", p});
      p.additional_tokens = 5;
      list.push_back({"neighborhood and more " + name + " " + std::to_string(rank) + "-D", p});
      p.rpb = true;
      p.head_dim = p.head_dim_v = 128;
      list.push_back({"neighborhood biased " + name + " " + std::to_string(rank) + "-D", p, true, dtype});
    }
  }
  return list;
}

// Packed sequences and padded keys.
std::vector<Case> length_cases() {
  std::vector<Case> list;
  const auto dense = [&](const std::string& name, Problem p, Dense mask) {
    mask.keys = 1000;
    p.mask = mask;
    list.push_back({name, p});
  };
  constexpr DeviceLengths kPacked = {.sequences = 9, .max_queries = 300, .max_keys = 400};
  constexpr DeviceLengths kPadded = {.key_lengths = true};
  for (const std::int64_t d : {64, 128, 256, 320}) {
    const std::string of = " D" + std::to_string(d);
    const DType dtype = d > 256 ? DType::float32 : DType::bfloat16;
    dense("packed" + of, sized(dtype, 1, {1000}, 4, 2, d, d), {.device = kPacked});
    dense("padded" + of, sized(dtype, 2, {1000}, 4, 2, d, d), {.device = kPadded});
    Problem more = sized(d > 256 ? DType::float64 : DType::float16, 1, {1000}, 4, 4, d, d);
    more.additional_tokens = 3;
    dense("packed more" + of, more, {.causal = Causal::bottom_right, .window_left = 50, .device = kPacked});
  }
  Problem biased = sized(DType::float16, 2, {1000}, 4, 4, 64, 64);
  biased.attn_bias = true;
  dense("padded biased", biased, {.causal = Causal::bottom_right, .device = kPadded});
  return list;
}

void compile(const std::string& name, const GpuTarget& target, const gpu::Spec& spec, nlohmann::json report = {}) {
  jit::CompileReport made;
  (void)jit::cubin(gpu::source_of(spec), {target.major, target.minor}, &made);
  report.update({{"name", name},
                 {"kernel", jit::name_of(gpu::source_of(spec))},
                 {"arch", std::to_string(target.major) + "." + std::to_string(target.minor)},
                 {"registers", made.registers},
                 {"spill_bytes", made.spill_store_bytes + made.spill_load_bytes},
                 {"stack_bytes", made.stack_bytes},
                 {"serialized", made.log.find("serialized") != std::string::npos},  // products that wait for each other
                 {"shared_bytes", gpu::shared_bytes(spec)},
                 {"shared_limit", target.shared_bytes_per_block},
                 {"threads", spec.threads()},
                 {"blocks_per_multiprocessor", spec.min_blocks}});
  std::cout << report.dump() << "\n";
}

// Problems of engine sm90, some with tiles.
struct BoxCase : Case {
  std::array<int, 3> tile_q{}, tile_kv{};
  bool crowd = false;  // several blocks on a multiprocessor
  bool parts = false;  // several blocks share out heads
};

std::vector<BoxCase> box_cases() {
  std::vector<BoxCase> list;
  const auto add = [&](std::int64_t d, std::int64_t dv, AxisValues layout, const auto& mask, std::int64_t more = 0) {
    const DType dtype = list.size() % 3 == 1 ? DType::float16 : DType::bfloat16;
    Problem p = sized(dtype, 2, layout, 4, 2, d, dv);
    p.mask = mask;
    p.additional_tokens = more;
    list.push_back({{"boxes " + std::to_string(list.size()) + " D" + std::to_string(d), p}, {}, {}});
  };
  Dense full, causal, sliding;
  full.keys = causal.keys = sliding.keys = 3000;
  causal.causal = Causal::bottom_right;
  sliding.window_left = sliding.window_right = 100;
  for (const std::int64_t d : {8, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256}) add(d, d, {3000}, full);
  for (const std::int64_t d : {64, 128, 256}) add(d, d, {3000}, causal, d == 128 ? 9 : 0);
  add(192, 128, {3000}, causal);
  add(64, 128, {3000}, sliding);
  for (const std::int64_t d : {64, 80, 128, 256}) {
    add(d, d, {5000}, Neighborhood{.kernel_size = 700, .is_causal = d == 64});
    add(d, d, {56, 56}, Neighborhood{.kernel_size = 7}, d == 64 ? 9 : 0);
    add(d, d, {128, 128}, Neighborhood{.kernel_size = 50, .dilation = 2});
    add(d, d, {8, 32, 32}, Neighborhood{.kernel_size = {4, 8, 8}, .is_causal = {1, 0, 0}}, d == 128 ? 9 : 0);
    add(d, d, {30, 48, 80}, Neighborhood{.kernel_size = {18, 24, 24}, .stride = {2, 8, 8}});
  }
  // The longest and the shortest tiles of keys with every tile of queries: sm90_shapes.h.
  constexpr std::array<int, 4> kShapes[] = {
      {64, 192, 128, 48}, {64, 128, 176, 48},  {64, 64, 176, 48},  {72, 192, 128, 48}, {72, 128, 176, 48},
      {72, 64, 176, 48},  {80, 192, 112, 48},  {80, 128, 176, 48}, {80, 64, 176, 48},  {128, 128, 176, 48},
      {128, 64, 176, 48}, {192, 128, 112, 32}, {192, 64, 112, 32}, {256, 128, 80, 32}, {256, 64, 80, 32},
  };
  for (const auto& [d, rows, most, least] : kShapes) {
    for (const int keys : {most, least}) {
      add(d, d, {3000}, causal);
      list.back().tile_q = {0, 0, rows};
      list.back().tile_kv = {0, 0, keys};
    }
  }
  // The longest tiles of crowds, and short ones.
  struct Crowd {
    std::array<int, 3> tile_q, tile_kv;
  };
  constexpr Crowd kCrowds[] = {
      {{1, 8, 8}, {1, 4, 20}}, {{1, 8, 8}, {1, 4, 24}}, {{1, 16, 4}, {1, 5, 16}}, {{1, 4, 16}, {1, 10, 8}},
      {{1, 8, 8}, {1, 2, 16}}, {{4, 4, 4}, {2, 4, 12}}, {{2, 4, 8}, {1, 5, 16}},  {{4, 4, 4}, {6, 4, 4}},
  };
  for (const std::int64_t d : {64, 40, 16}) {
    for (const Crowd& crowd : kCrowds) {
      const bool volume = crowd.tile_q[0] > 1;
      for (const bool plain : {true, false}) {
        Neighborhood mask{.kernel_size = volume ? 6 : 13};
        if (!plain) mask.is_causal = volume ? AxisValues{1, 0, 1} : AxisValues{0, 1};
        if (!plain) mask.dilation = 2;
        add(d, d, volume ? AxisValues{24, 32, 40} : AxisValues{128, 136}, mask, plain ? 0 : 9);
        list.back().tile_q = crowd.tile_q;
        list.back().tile_kv = crowd.tile_kv;
        list.back().crowd = true;
        list.back().problem.heads_kv = list.back().problem.heads;  // otherwise two heads share a tile
      }
    }
  }
  // Packed sequences and padded keys, heads in one tile, keys in parts, lines in pieces.
  Dense packed = causal, padded = full;
  packed.device = {.sequences = 9, .max_queries = 400, .max_keys = 400};
  padded.device.key_lengths = true;
  for (const std::int64_t d : {64, 80, 128, 256}) {
    add(d, d, {3000}, packed, d == 128 ? 9 : 0);
    list.back().problem.batch = 1;
    add(d, d, {3000}, padded);
    add(d, d, {1}, padded, d == 64 ? 9 : 0);
    add(d, d, {16}, sliding);
    list.back().problem.heads = 16;
    add(d, d, {5000}, Neighborhood{.kernel_size = 300, .dilation = 8}, d == 128 ? 9 : 0);
    add(d, d, {33, 34}, Neighborhood{.kernel_size = 30, .is_causal = {0, d == 64}}, d == 256 ? 9 : 0);
    list.back().problem.batch = list.back().problem.heads_kv = 1;
    list.back().problem.heads = 2;
    add(d, d, {6, 15, 17}, Neighborhood{.kernel_size = {5, 14, 15}, .is_causal = {1, 0, 0}}, d == 64 ? 9 : 0);
    list.back().problem.batch = list.back().problem.heads = list.back().problem.heads_kv = 1;
  }
  // Features that are no multiple of 16.
  add(72, 72, {3000}, packed, 9);
  list.back().problem.batch = 1;
  add(72, 72, {3000}, padded);
  add(72, 72, {5000}, Neighborhood{.kernel_size = 300, .dilation = 8}, 9);
  add(72, 72, {5000}, Neighborhood{.kernel_size = 700, .is_causal = true});
  add(72, 72, {128, 128}, Neighborhood{.kernel_size = 50, .dilation = 2});
  add(72, 72, {33, 34}, Neighborhood{.kernel_size = 30, .is_causal = {0, 1}}, 9);
  for (const auto& [d, dv] : {std::pair(40, 40), std::pair(72, 72), std::pair(88, 104), std::pair(136, 200)}) {
    add(d, dv, {8, 32, 32}, Neighborhood{.kernel_size = {4, 8, 8}, .is_causal = {1, 0, 0}}, 9);
    add(d, dv, {30, 48, 80}, Neighborhood{.kernel_size = {18, 24, 24}, .stride = {2, 8, 8}});
  }
  // Gradients of all head dims that have them.
  Dense sliding_packed = sliding, sliding_padded = sliding;
  sliding_packed.device = packed.device;
  sliding_padded.device.key_lengths = true;
  for (const auto& [d, dv] : {std::pair(40, 40), std::pair(72, 128), std::pair(192, 128), std::pair(256, 256)}) {
    add(d, dv, {3000}, sliding_packed, d == 72 ? 9 : 0);
    list.back().problem.batch = 1;
    add(d, dv, {3000}, sliding_padded, d == 40 ? 9 : 0);
  }
  // Gradients by several blocks on a multiprocessor: there must be enough.
  const std::size_t first_crowd = list.size();
  for (const auto& [d, dv] : {std::pair(64, 64), std::pair(16, 48), std::pair(64, 32), std::pair(40, 56)}) {
    add(d, dv, {56, 56}, Neighborhood{.kernel_size = 13});
    add(d, dv, {60, 64},
        Neighborhood{.kernel_size = {9, 16}, .stride = {1, 3}, .dilation = {2, 1}, .is_causal = {1, 0}},
        d == 16 ? 9 : 0);
    add(d, dv, {50, 64}, Neighborhood{.kernel_size = 11, .dilation = {1, 2}, .is_causal = {0, 1}}, 9);
    add(d, dv, {8, 32, 32}, Neighborhood{.kernel_size = {4, 8, 8}});
    add(d, dv, {8, 32, 32},
        Neighborhood{.kernel_size = {4, 9, 8}, .stride = {2, 1, 3}, .dilation = {1, 2, 1}, .is_causal = {0, 1, 1}}, 9);
  }
  for (std::size_t i = first_crowd; i < list.size(); ++i) list[i].problem.batch = 32;
  // By blocks that share out the query heads of a group.
  const std::size_t first_parts = list.size();
  for (const auto& [d, dv] : {std::pair(64, 64), std::pair(40, 24), std::pair(128, 96), std::pair(256, 256)}) {
    for (const Dense& mask : {full, causal, sliding, packed, padded}) add(d, dv, {500}, mask);
    add(d, dv, {900}, Neighborhood{.kernel_size = 199, .stride = 7, .dilation = 3, .is_causal = 1});
    add(d, dv, {31, 45}, Neighborhood{.kernel_size = {20, 33}, .stride = {4, 3}, .is_causal = {0, 1}});
    add(d, dv, {9, 15, 17}, Neighborhood{.kernel_size = {5, 9, 12}, .is_causal = {1, 0, 0}});
  }
  for (std::size_t i = first_parts; i < list.size(); ++i) {
    list[i].problem.batch = list[i].problem.heads_kv = 1;
    list[i].problem.heads = 24;
    list[i].parts = true;
  }
  add(128, 128, {256, 256}, Neighborhood{.kernel_size = 80});
  add(128, 128, {30, 48, 80}, Neighborhood{.kernel_size = {18, 24, 24}});
  for (const auto& [d, dv] : {std::pair(192, 192), std::pair(160, 200), std::pair(64, 256)}) {
    add(d, dv, {3000}, causal);
    add(d, dv, {60, 70}, Neighborhood{.kernel_size = 30}, 9);
    add(d, dv, {12, 30, 30}, Neighborhood{.kernel_size = {5, 10, 12}});
  }
  return list;
}

void compile_boxes(const BoxCase& c, const GpuTarget& target) {
  Plan plan = choose_plan(c.problem, {.engine = Engine::sm90, .tile_q = c.tile_q, .tile_kv = c.tile_kv, .gpu = target});
  if (c.crowd && plan.gpu.forward.blocks_per_multiprocessor < 2) throw std::logic_error(c.name + " is no crowd");
  for (const bool logsumexp : {false, true}) {
    compile(c.name, target, gpu::spec_of(plan, gpu::Kernel::sm90_forward, logsumexp, true, c.bias_type),
            {{"work_ratio", plan.gpu.forward.work.ratio()}});
    if (c.problem.dense()) break;
  }
  for (const bool deterministic : {false, true}) {
    if (c.crowd) break;  // of the forward pass only
    PlanOptions options = {.engine = Engine::sm90, .gpu = target};
    options.backward.deterministic = deterministic;
    const GpuGradientPlan& gradients = (plan = choose_plan(c.problem, options)).gpu.backward;
    if (gradients.keys.family != GpuKernels::warpgroups || (!deterministic && !gradients.add_queries)) continue;
    const auto run = [&](gpu::Kernel kernel, double ratio) {
      gpu::Spec spec = gpu::spec_of(plan, kernel, true, true, c.bias_type);
      spec.careful_sums = kernel == gpu::Kernel::convert;
      compile(c.name, target, spec, {{"work_ratio", ratio}});
    };
    run(gpu::Kernel::sm90_keys, gradients.keys.work.ratio());
    if (gradients.values.tile.rows > 0) run(gpu::Kernel::sm90_values, gradients.values.work.ratio());
    if (gradients.keys.key_parts > 1) run(gpu::Kernel::convert_keys, 1);
    else if (c.parts) throw std::logic_error(c.name + " has no parts");
    if (gradients.add_queries) run(gpu::Kernel::convert, 1);
    else run(gpu::Kernel::sm90_queries, gradients.queries.work.ratio());
  }
}

void compile(const Case& c, const GpuTarget& target, bool deterministic) {
  PlanOptions options = {.engine = Engine::sm80, .gpu = target};
  options.backward.deterministic = deterministic;
  const Plan plan = choose_plan(c.problem, options);
  const auto run = [&](gpu::Kernel kernel) {
    compile(c.name, target, gpu::spec_of(plan, kernel, true, c.vectors, c.bias_type),
            {{"atomics", plan.gpu.backward.add_queries},
             {"work_ratio", plan.gpu.forward.work.ratio()},
             {"without_tensor_cores", plan.gpu.reason}});
  };
  using gpu::Kernel;
  const bool plain = plan.gpu.forward.family == GpuKernels::plain;
  if (!deterministic) run(plain ? Kernel::plain_forward : Kernel::forward);
  const auto* dense = std::get_if<Dense>(&plan.problem.mask);
  if (!deterministic && dense != nullptr && dense->packed()) run(Kernel::packed_rest);
  if (plan.gpu.backward.keys.family == GpuKernels::plain) {  // one way, deterministic
    if (!deterministic) return;
    for (const Kernel kernel : {Kernel::plain_delta, Kernel::plain_queries, Kernel::plain_keys}) run(kernel);
    if (c.problem.additional_tokens > 0) run(Kernel::plain_additional);
    if (c.problem.rpb) run(Kernel::plain_bias);
    return;
  }
  if (deterministic) run(Kernel::queries);
  if (!deterministic) run(Kernel::convert);
  run(Kernel::keys);
  if (c.problem.additional_tokens > 0) run(Kernel::additional);
  if (deterministic) run(Kernel::delta);
  if (deterministic && c.problem.rpb) run(Kernel::bias);
}

// Kernels without a plan.
struct Unplanned {
  std::string name;
  gpu::Spec spec;
};

std::vector<Unplanned> unplanned() {
  using gpu::Kernel;
  std::vector<Unplanned> list;
  int n = 0;
  const auto unfused = [&](DType dtype, Kernel kernel, std::int64_t width, int rank) {
    Problem p = sized(dtype, 2,
                      rank == 1   ? AxisValues{60}
                      : rank == 2 ? AxisValues{12, 14}
                                  : AxisValues{5, 6, 7},
                      4, 2, width, width);
    p.mask = Neighborhood{
        .kernel_size = rank == 1 && n % 2 == 0 ? 201 : 3, .stride = 1, .dilation = n % 2 + 1, .is_causal = n % 2};
    list.push_back({"unfused " + std::to_string(width), gpu::unfused_spec(validate(p), kernel, width != 41, dtype)});
    ++n;
  };
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    for (const Kernel kernel : {Kernel::unfused_scores, Kernel::unfused_to_queries, Kernel::unfused_to_keys,
                                Kernel::unfused_to_additional, Kernel::unfused_to_bias}) {
      unfused(dtype, kernel, n % 4 == 0 ? 640 : n % 4 == 1 ? 64 : n % 4 == 2 ? 32 : 41, n % 3 + 1);
    }
    for (const Kernel kernel : {Kernel::merge_forward, Kernel::merge_sums, Kernel::merge_backward}) {
      const int width = n % 3 == 0 ? 520 : n % 3 == 1 ? 64 : 41;
      list.push_back({"merge " + std::to_string(width), gpu::merge_spec(kernel, dtype, width, width != 41)});
      ++n;
    }
  }
  for (const int width : {8, 128, 200, 256}) {
    const DType dtype = width == 128 ? DType::float16 : DType::bfloat16;
    list.push_back({"merge parts " + std::to_string(width), gpu::merge_spec(Kernel::merge_parts, dtype, width, true)});
  }
  // With tensor cores.
  for (const Kernel kernel : {Kernel::unfused_scores, Kernel::unfused_to_queries, Kernel::unfused_to_keys}) {
    for (const std::int64_t width : {8, 64, 96, 128, 256, 640}) {
      for (int rank = 1; rank <= 3; ++rank) unfused(n % 2 == 0 ? DType::bfloat16 : DType::float16, kernel, width, rank);
    }
  }
  return list;
}

}  // namespace
}  // namespace vicus

int main(int argc, char** argv) {
  using namespace vicus;  // NOLINT(google-build-using-namespace): the program is of one namespace
  if (argc != 3) return 2;
  const std::size_t part = std::strtoul(argv[1], nullptr, 10), parts = std::strtoul(argv[2], nullptr, 10);
  std::vector<GpuTarget> targets;
  for (const char* const arch : {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120"}) {
    targets.push_back(gpu_targets(arch).front());
  }
  std::vector<Case> all = cases();
  const std::vector<Case> plain = plain_cases();
  all.insert(all.end(), plain.begin(), plain.end());
  const std::vector<Case> lengths = length_cases();
  all.insert(all.end(), lengths.begin(), lengths.end());
  for (std::size_t i = part; i < all.size(); i += parts) {
    const GpuTarget& target = targets[i / parts % targets.size()];
    for (const bool deterministic : {false, true}) compile(all[i], target, deterministic);
  }
  const std::vector<BoxCase> boxes = box_cases();
  for (std::size_t i = part; i < boxes.size(); i += parts) compile_boxes(boxes[i], targets[2]);
  const std::vector<Unplanned> others = unplanned();
  for (std::size_t i = part; i < others.size(); i += parts) {
    compile(others[i].name, targets[i % targets.size()], others[i].spec);
  }
}
