#include "cli/profile.h"

#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <iomanip>
#include <limits>
#include <memory>
#include <optional>
#include <ostream>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cli/peak.h"
#include "cli/plan_json.h"
#include "cli/problem_options.h"
#include "cli/progress.h"
#include "cli/validators.h"
#include "vicus/attention.h"
#include "vicus/device.h"

namespace vicus::cli {
namespace {

constexpr const char* kFooter =
    R"(Useful work counts only (query, key) pairs of the mask; its floor is the time that this work takes when every arithmetic
unit is busy all the time. The peak behind it is measured before and after the run unless --peak-gflops gives it; that of a
GPU is not measured. A GPU is timed by its own clock, with all arrays in its memory.

Examples:
  vicus profile --layout 56 56 --heads 8 --head-dim 64 --kernel-size 13 13
      Forward and backward of a 13 x 13 window on 56 x 56 tokens, random data.
  vicus profile --layout 4096 --heads 8 --head-dim 128 --dense --threads 1 --no-backward --json
      Dense attention on one thread, forward only, as JSON.)";

struct ProfileOptions {
  ShapeOptions shape;
  MaskOptions mask;
  EngineOptions engine;
  int repeats = 20, warmup = 2;
  double seconds = 10;
  std::optional<double> peak_gflops;
  bool no_backward = false, json = false;
};

/// A tensor of its own memory, of the host or of a GPU.
struct Tensor {
  std::vector<std::byte> data;
  DeviceMemory device;
  TensorView view;
};

Tensor make_tensor(DType dtype, const std::vector<std::int64_t>& shape) {
  Tensor tensor;
  const TensorLayout layout{std::span<const std::int64_t>(shape)};
  tensor.data.resize(static_cast<std::size_t>(layout.numel()) * dtype_size(dtype));
  tensor.view = TensorView(tensor.data.data(), dtype, layout);
  return tensor;
}

/// Numbers in (-1, 1); for float16 of magnitude 1/8 to 1, which its bits give without arithmetic in that type.
Tensor random_tensor(DType dtype, const std::vector<std::int64_t>& shape, std::mt19937_64& random) {
  Tensor tensor = make_tensor(dtype, shape);
  const std::size_t size = dtype_size(dtype);
  const auto store = [&](std::size_t at, const auto& value) { std::memcpy(tensor.data.data() + at, &value, size); };
  for (std::size_t at = 0; at < tensor.data.size(); at += size) {
    const std::uint64_t bits = random();
    const double uniform = static_cast<double>(bits >> 11) * 0x1p-52 - 1.0;
    const auto single = static_cast<float>(uniform);
    switch (dtype) {
      case DType::float64:
        store(at, uniform);
        break;
      case DType::float32:
        store(at, single);
        break;
      case DType::bfloat16: {
        std::uint32_t word = 0;
        std::memcpy(&word, &single, sizeof(word));
        store(at, static_cast<std::uint16_t>(word >> 16));
        break;
      }
      case DType::float16: {
        const std::uint64_t exponent = 12 + (bits >> 11) % 3;
        store(at, static_cast<std::uint16_t>((bits & 0x8000) | exponent << 10 | (bits & 0x3ff)));
        break;
      }
    }
  }
  return tensor;
}

/// The tensor where the plan's engine wants it.
Tensor placed(Tensor tensor, const Plan& plan) {
  if (!runs_on_gpu(plan.engine)) return tensor;
  tensor.device = DeviceMemory(tensor.data.size());
  tensor.device.write(tensor.data.data());
  tensor.data = {};
  tensor.view = TensorView(tensor.device.data(), tensor.view.dtype(), tensor.view);
  return tensor;
}

/// Makes a call and returns its seconds, by the clock of what computes it.
using Clock = std::function<double(const std::function<void()>&)>;

double seconds_on_cpu(const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Clock clock_of(const Plan& plan) {
  if (!runs_on_gpu(plan.engine)) return seconds_on_cpu;
  return [timer = std::make_shared<DeviceTimer>()](const std::function<void()>& call) {
    timer->start();
    call();
    timer->stop();
    return timer->seconds();
  };
}

struct Timing {
  std::vector<double> seconds;  // sorted
  [[nodiscard]] double quantile(double q) const {
    return seconds[static_cast<std::size_t>(std::lround(q * static_cast<double>(seconds.size() - 1)))];
  }
};

/// Times `call`: `warmup` times without the clock, then until `repeats` or `budget` seconds are reached, at least once.
Timing time_calls(const std::function<void()>& call, const Clock& clock, const ProfileOptions& options, double budget,
                  Progress& progress, const std::string& label) {
  using Wall = std::chrono::steady_clock;
  const auto since = [](Wall::time_point begin) { return std::chrono::duration<double>(Wall::now() - begin).count(); };
  const auto begin = Wall::now();
  progress.update(label + ", warm-up", 0);
  for (int i = 0; i < options.warmup; ++i) {
    clock(call);
    if (since(begin) > budget / 2) break;
  }
  Timing timing;
  while (timing.seconds.empty() ||
         (static_cast<int>(timing.seconds.size()) < options.repeats && since(begin) < budget)) {
    timing.seconds.push_back(clock(call));
    progress.update(label,
                    std::max(static_cast<double>(timing.seconds.size()) / options.repeats, since(begin) / budget));
  }
  std::sort(timing.seconds.begin(), timing.seconds.end());
  return timing;
}

struct Pass {
  const char* name = "";
  Timing timing;
  double flops = 0, bytes = 0;
};

struct Data {
  Tensor query, key, value, additional_keys, additional_values, rpb, attn_bias;
  AttentionInputs inputs;
};

Data random_inputs(const Plan& plan) {
  const Problem& problem = plan.problem;
  std::mt19937_64 random(1);  // the same data in every run: timings compare
  Data data;
  const auto fill = [&](Tensor& tensor, ConstTensorView& view, const std::vector<std::int64_t>& shape) {
    tensor = placed(random_tensor(problem.dtype, shape, random), plan);
    view = tensor.view;
  };
  fill(data.query, data.inputs.query, problem.query_shape());
  fill(data.key, data.inputs.key, problem.key_shape());
  fill(data.value, data.inputs.value, problem.value_shape());
  if (problem.additional_tokens > 0) {
    fill(data.additional_keys, data.inputs.additional_keys, problem.additional_keys_shape());
    fill(data.additional_values, data.inputs.additional_values, problem.additional_values_shape());
  }
  if (problem.rpb) fill(data.rpb, data.inputs.rpb, problem.rpb_shape());
  if (problem.attn_bias) fill(data.attn_bias, data.inputs.attn_bias, {1, 1, problem.queries(), problem.keys()});
  return data;
}

std::vector<Pass> run_passes(const Plan& plan, const ProfileOptions& options, Progress& progress) {
  const Problem& problem = plan.problem;
  const Clock clock = clock_of(plan);
  const auto make = [&](DType dtype, const std::vector<std::int64_t>& shape) {
    return placed(make_tensor(dtype, shape), plan);
  };
  const Data data = random_inputs(plan);
  const DType lse_dtype = problem.dtype == DType::float64 ? DType::float64 : DType::float32;
  const Tensor output = make(problem.dtype, problem.output_shape());
  const Tensor logsumexp = make(lse_dtype, problem.logsumexp_shape());
  const double budget = options.seconds / (options.no_backward ? 1 : 2);
  std::vector<Pass> passes;
  const auto forward_call = [&] { forward(plan, data.inputs, output.view, logsumexp.view); };
  passes.push_back({"forward", time_calls(forward_call, clock, options, budget, progress, "forward"),
                    plan.forward_flops, plan.forward_bytes});
  if (options.no_backward) return passes;

  std::mt19937_64 random(2);
  const Tensor grad_output = placed(random_tensor(problem.dtype, problem.output_shape(), random), plan);
  const AttentionGradInputs grad_inputs = {output.view, logsumexp.view, grad_output.view, {}};
  const Tensor dq = make(problem.dtype, problem.query_shape());
  const Tensor dk = make(problem.dtype, problem.key_shape());
  const Tensor dv = make(problem.dtype, problem.value_shape());
  Tensor extra_keys, extra_values, bias;
  AttentionGradients gradients;
  gradients.query = dq.view;
  gradients.key = dk.view;
  gradients.value = dv.view;
  if (problem.additional_tokens > 0) {
    extra_keys = make(problem.dtype, problem.additional_keys_shape());
    extra_values = make(problem.dtype, problem.additional_values_shape());
    gradients.additional_keys = extra_keys.view;
    gradients.additional_values = extra_values.view;
  }
  if (problem.rpb) {
    bias = make(problem.dtype, problem.rpb_shape());
    gradients.rpb = bias.view;
  }
  const auto backward_call = [&] { backward(plan, data.inputs, grad_inputs, gradients); };
  passes.push_back({"backward", time_calls(backward_call, clock, options, budget, progress, "backward"),
                    plan.backward_flops, plan.backward_bytes});
  return passes;
}

/// What passes are compared with; none where no peak was given and none is measured.
struct Reference {
  std::optional<Peak> peak;
  bool measured = false;
};

Json pass_json(const Pass& pass, const Reference& reference) {
  const double median = pass.timing.quantile(0.5);
  Json json = {{"repeats", pass.timing.seconds.size()},
               {"seconds_median", median},
               {"seconds_min", pass.timing.quantile(0)},
               {"seconds_max", pass.timing.quantile(1)},
               {"seconds_quartiles", {pass.timing.quantile(0.25), pass.timing.quantile(0.75)}},
               {"useful_flops", pass.flops},
               {"useful_flops_per_second", pass.flops / median},
               {"compulsory_bytes", pass.bytes},
               {"compulsory_bytes_per_second", pass.bytes / median}};
  if (reference.peak) {
    json["floor_seconds"] = pass.flops / reference.peak->flops_per_second;
    json["share_of_peak"] = pass.flops / median / reference.peak->flops_per_second;
  }
  return json;
}

void print(const std::vector<Pass>& passes, const Plan& plan, const Reference& reference, std::ostream& out) {
  const auto column = [&](int width, double value, int digits) {
    out << std::setw(width) << std::fixed << std::setprecision(digits) << value;
  };
  out << "engine " << engine_name(plan.engine) << ", ";
  if (runs_on_gpu(plan.engine)) {
    out << plan.gpu.device.multiprocessors << " multiprocessors";
  } else {
    out << plan.threads << " threads";
  }
  out << ", " << dtype_name(plan.problem.dtype) << "\npeak   ";
  if (reference.peak) {
    out << std::fixed << std::setprecision(1) << reference.peak->flops_per_second * 1e-9 << " GFLOP/s ("
        << (reference.measured ? "measured here, multiply-adds in registers, " + reference.peak->target : "as given")
        << ")\n\n";
  } else {
    out << "not measured on GPUs; --peak-gflops gives it\n\n";
  }
  out << "pass       median ms      min      max  repeats  useful GFLOP/s     GB/s"
      << (reference.peak ? "  floor ms  of peak\n" : "\n");
  for (const Pass& pass : passes) {
    const double median = pass.timing.quantile(0.5);
    out << std::left << std::setw(10) << pass.name << std::right;
    column(10, median * 1e3, 3);
    column(9, pass.timing.quantile(0) * 1e3, 3);
    column(9, pass.timing.quantile(1) * 1e3, 3);
    out << std::setw(9) << pass.timing.seconds.size();
    column(16, pass.flops / median * 1e-9, 2);
    column(9, pass.bytes / median * 1e-9, 2);
    if (reference.peak) {
      column(10, pass.flops / reference.peak->flops_per_second * 1e3, 3);
      column(7, pass.flops / median / reference.peak->flops_per_second * 100, 1);
      out << " %";
    }
    out << '\n';
  }
}

void profile(const ProfileOptions& options, Context& context) {
  const Plan plan = choose_plan(make_problem(options.shape, options.mask), make_plan_options(options.engine));
  const auto measure = [&] { return measure_peak(plan.problem.dtype == DType::float64, plan.threads); };
  Reference reference{.peak = {}, .measured = !options.peak_gflops && !runs_on_gpu(plan.engine)};
  if (options.peak_gflops) reference.peak = Peak{.flops_per_second = *options.peak_gflops * 1e9, .target = {}};
  std::vector<Pass> passes;
  {
    Progress progress(context.err, context.progress);
    if (reference.measured) {
      progress.update("peak", 0);
      reference.peak = measure();
    }
    passes = run_passes(plan, options, progress);
    if (reference.measured) {  // again: what disturbed the first measurement may be over
      reference.peak->flops_per_second = std::max(reference.peak->flops_per_second, measure().flops_per_second);
    }
  }
  if (!options.json) return print(passes, plan, reference, context.out);
  Json json = {{"plan", to_json(plan)}};
  if (reference.peak) {
    json["peak_flops_per_second"] = reference.peak->flops_per_second;
    json["peak_source"] = reference.measured ? "measured" : "given";
  }
  if (reference.measured) json["peak_target"] = reference.peak->target;
  for (const Pass& pass : passes) json[pass.name] = pass_json(pass, reference);
  context.out << json.dump(2) << '\n';
}

}  // namespace

void add_profile(CLI::App& app, Context& context) {
  auto options = std::make_shared<ProfileOptions>();
  CLI::App* command = app.add_subcommand("profile", "Time forward and backward of a problem on random data");
  command->footer(kFooter);
  add_shape_options(*command, options->shape);
  add_mask_options(*command, options->mask);
  add_engine_options(*command, options->engine);
  const char* const group = "Measurement";
  command->add_option("--repeats", options->repeats, "Most timed calls of each pass [20]")
      ->check(within(1, 1000000))
      ->type_name("N")
      ->group(group);
  command->add_option("--warmup", options->warmup, "Calls before the clock starts [2]")
      ->check(within(0, 1000000))
      ->type_name("N")
      ->group(group);
  command->add_option("--seconds", options->seconds, "Time to spend on all passes, about [10]")
      ->check(within(1e-3, 1e6))
      ->type_name("X")
      ->group(group);
  command->add_option("--peak-gflops", options->peak_gflops, "Peak to compare with, in GFLOP/s [measured]")
      ->check(within(1e-3, 1e12))
      ->type_name("X")
      ->group(group);
  command->add_flag("--no-backward", options->no_backward, "Time the forward pass only")->group(group);
  command->add_flag("--json", options->json, "Print JSON");
  command->callback([options, &context] { context.action = [options, &context] { profile(*options, context); }; });
}

}  // namespace vicus::cli
